"""The plan of a conversion is what then happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.cli import run
from aphroquant.conversion.arguments import make_request
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.planning.estimate import Estimate, estimate
from aphroquant.planning.excerpt import write_excerpt
from aphroquant.planning.gpus import GPUS
from aphroquant.planning.plan import Plan, plan
from aphroquant.planning.report import plan_text
from aphroquant.planning.trial import Spent, Trial, try_conversion

Tiny = Callable[..., Path]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "torch_dtype": "float16"}


def planned(source: Path, to: str, **options: Any) -> Plan:
    return plan([make_request(source, to=to, out=source.parent / "planned", **options)], tries=False)


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("awq", {"solver": "rtn", "samples": 0}),
        ("compressed-tensors", {"scheme": "fp8-dynamic"}),
        ("gptq", {"solver": "rtn", "samples": 0, "rules": ["down_proj: bits=8"]}),
        ("gguf", {"scheme": "q4_k_m"}),
    ],
)
def test_sizes_are_foretold_within_one_percent(
    to: str, options: dict[str, Any], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    (output,) = planned(source, to, **options).outputs
    result = aphroquant.convert(source, to=to, out=tmp_path / "out", **options)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert output.num_bytes == result.num_bytes
    assert output.bits_per_weight == result.bits_per_weight
    assert output.file_bytes == pytest.approx(written, rel=0.01)


def test_several_outputs_gpus_and_layers_that_do_not_divide_are_told(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", **WIDE)
    requests = [
        make_request(source, to="gptq", out=tmp_path / "a", group_size=256, symmetric=True, samples=0, solver="rtn"),
        make_request(source, to="awq", out=tmp_path / "b", samples=0, solver="rtn", rules=["q: keep"]),
    ]
    found = plan(requests, gpus=[GPUS["l4-24g"]], tensor_parallel=2, tries=False)
    text = plan_text(found)
    assert "a: gptq, int4 sym g256" in text
    assert "a rank's 128 of 256 inputs are no multiple of 256 (int4 sym g256)" in text
    assert "l4-24g x 2" in text
    assert "vLLM, SGLang and kernels for" in (found.outputs[1].fused or "")
    assert found.disk_bytes == sum(output.file_bytes for output in found.outputs)
    json.dumps(found.to_dict())


def test_an_excerpt_is_a_whole_model_of_fewer_layers(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3", num_hidden_layers=3, max_shard_size="100KB")
    write_excerpt(open_checkpoint(source), 1, tmp_path / "one")
    found = open_checkpoint(tmp_path / "one")
    assert found.spec.num_layers == 1
    assert found.config["layer_types"] == ["full_attention"]
    whole = open_checkpoint(source)
    kept = {name for name in whole.tensors if ".layers.1." not in name and ".layers.2." not in name}
    assert set(found.tensors) == kept
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        for name in kept:
            assert bool((file.get_tensor(name) == whole.read(name)).all())


def test_an_excerpt_of_a_quantized_source_stays_quantized(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    aphroquant.convert(tiny_checkpoint("llama"), to="awq", solver="rtn", samples=0, out=tmp_path / "awq")
    write_excerpt(open_checkpoint(tmp_path / "awq"), 1, tmp_path / "one")
    assert open_checkpoint(tmp_path / "one").format_name == "awq"


def spent(cpu_seconds: float) -> Spent:
    """On a machine where half of the time on the clock is the processor's."""
    return Spent(2 * cpu_seconds, cpu_seconds)


def test_time_and_memory_follow_from_trials_on_the_first_blocks(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def trial(requests: Any, source: Path, samples: int, out: Path) -> Trial:
        layers = open_checkpoint(source).spec.num_layers
        asked.append((layers, samples))
        block = 0.5 + 0.1 * samples  # what a machine might take
        blocks, rest = 1.0 + layers * block, 2.0 + 0.25 * layers
        return Trial(spent(rest + blocks), spent(blocks), spent(block), 1000 + 10 * samples, 0)

    monkeypatch.setattr("aphroquant.planning.estimate.try_conversion", trial)
    source = tiny_checkpoint("llama", num_hidden_layers=6)
    request = make_request(source, to="gptq", out=tmp_path / "out", samples=100, seq_len=512)
    found = estimate(open_checkpoint(source), [request], calibrates=True)
    assert asked == [(1, 8), (2, 8), (2, 24)]
    assert found.cpu_seconds == pytest.approx(3.0 + 6 * (0.25 + 0.5 + 0.1 * 100))
    assert found.seconds == pytest.approx(2 * found.cpu_seconds)
    assert found.peak_bytes == 1000 + 10 * 100


def test_without_calibration_more_blocks_are_tried_so_that_their_time_shows(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def trial(requests: Any, source: Path, samples: int, out: Path) -> Trial:
        asked.append(open_checkpoint(source).spec.num_layers)
        return Trial(spent(2.0 + 0.01 * asked[-1]), spent(0.0), spent(0.0), 1000, 0)

    monkeypatch.setattr("aphroquant.planning.estimate.try_conversion", trial)
    source = tiny_checkpoint("llama", num_hidden_layers=12)
    request = make_request(source, to="gguf", out=tmp_path / "out.gguf")
    found = estimate(open_checkpoint(source), [request], calibrates=False)
    assert asked == [1, 9]
    assert found.cpu_seconds == pytest.approx(2.0 + 12 * 0.01)


def test_a_trial_tells_what_each_block_takes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=2)
    request = make_request(source, to="gptq", out=tmp_path / "out", samples=4, seq_len=32)
    found = try_conversion([request], source, 4, tmp_path / "made")
    assert 0 < found.block.cpu_seconds < found.blocks.cpu_seconds < found.whole.cpu_seconds


def test_a_trial_converts_for_real(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=1)
    request = make_request(source, to="gptq", out=tmp_path / "out", samples=4, seq_len=32, effort="best")
    found = plan([request], work=tmp_path)
    assert found.estimate is not None
    assert found.estimate.seconds > 0
    assert found.estimate.peak_bytes > 100 * 2**20
    assert found.estimate.left_out == "steps of training, which are not tried"
    assert not list(tmp_path.iterdir())
    assert "MiB at most" in plan_text(found)


def test_what_cannot_be_converted_is_said_at_once(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    with pytest.raises(UsageError, match="group_size = 48"):
        planned(source, "gptq", group_size=48)
    with pytest.raises(UsageError, match="tensor_parallel = 0 must be at least 1"):
        plan([make_request(source, to="gptq", out=tmp_path / "out")], tensor_parallel=0, tries=False)


def test_outputs_that_one_pass_cannot_make_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    first = make_request(source, to="gptq", out=tmp_path / "a", seed=0)
    for second in (
        make_request(source, to="awq", out=tmp_path / "a" / "b"),
        make_request(source, to="auto-round", symmetric=True, out=tmp_path / "b", seed=1),
    ):
        with pytest.raises(UsageError, match=r"each other's place|share their calibration"):
            plan([first, second], tries=False)


def test_of_a_gguf_file_time_is_not_known_and_it_says_why(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    aphroquant.convert(tiny_checkpoint("llama"), to="gguf", scheme="q8_0", out=tmp_path / "m.gguf")
    found = plan([make_request(tmp_path / "m.gguf", to="gguf", out=tmp_path / "n.gguf", scheme="q8_0")])
    assert isinstance(found.estimate, Estimate | None)
    assert "only directories of safetensors can be tried in parts" in plan_text(found)


def test_every_option_that_it_shares_with_convert_is_part_of_the_request() -> None:
    from aphroquant.cli.plan import command

    own = {"recipe", "gpus", "tensor_parallel", "tries", "json_file", "threads"}
    shared = {option.name for option in command.params} - own
    assert shared <= set(ConversionRequest.__dataclass_fields__)


def test_the_command_takes_the_options_of_convert(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    words = ["plan", str(source), "--to", "gptq", "--bits", "3", "--solver", "rtn", "--samples", "0", "--no-probe"]
    assert run([*words, "--gpu", "l4-24g"]) == 0
    text = capsys.readouterr().out
    assert "gptq, int3 asym g64" in text
    assert "time, memory  unknown: nothing was tried" in text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert run([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["to"] == "gptq"
    assert run(["plan", str(source), "--no-probe"]) == 2
    assert run([*words, "--gpu", "h1000"]) == 2


def test_all_outputs_of_a_recipe_are_planned(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("outputs:\n  small: {to: gptq, bits: 3}\n  file: {to: gguf, scheme: q8_0}\n")
    source = str(tiny_checkpoint("llama"))
    assert run(["plan", source, "--recipe", str(recipe), "--no-probe"]) == 0
    text = capsys.readouterr().out
    assert "small: gptq, int3" in text
    assert "file.gguf: gguf, Q8_0" in text
    assert run(["plan", "--recipe", str(recipe), "--no-probe"]) == 2
