"""Bits chosen for each layer: within the budget, engines' groups alike, better than what is uniform, repeatable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS, calibration_windows
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult, walk
from aphroquant.conversion.allocation import choosing
from aphroquant.conversion.allocation.choosing import chosen_widths
from aphroquant.conversion.allocation.divergence import MeasuredDivergence
from aphroquant.conversion.allocation.pieces import PieceStore
from aphroquant.conversion.allocation.problem import make_problem
from aphroquant.conversion.allocation.sensitivity import Sensitivity, item_damages
from aphroquant.conversion.fused import fused_groups
from aphroquant.conversion.job.choices import KeptChoices
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.evaluation import evaluate
from aphroquant.schemes import IntegerScheme

Tiny = Callable[..., Path]
TEXT = DEFAULT_TEXTS / "calibration_chat.jsonl"
QUICK: dict[str, Any] = {"samples": 12, "seq_len": 32, "calibration": TEXT, "effort": "fast"}
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


def bits_of(out: Path) -> dict[str, int]:
    return {
        module: scheme.bits
        for module, scheme in open_checkpoint(out).schemes().items()
        if isinstance(scheme, IntegerScheme)
    }


@pytest.mark.parametrize(("to", "bits"), [("gptq", 4.5), ("auto-round", 5.0), ("compressed-tensors", 5.5)])
def test_the_average_is_met_and_never_exceeded(tiny_checkpoint: Tiny, tmp_path: Path, to: str, bits: float) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=6)
    result = converted(source, tmp_path / "out", to=to, bits=bits, group_size=32, solver="rtn")
    assert 0.97 * bits < result.bits_per_weight <= bits
    assert result.allocation["bits_per_weight"] == result.bits_per_weight
    found = bits_of(tmp_path / "out")
    assert {str(width) for width in found.values()} == set(result.allocation["widths"])
    assert len(set(found.values())) > 1
    for group in fused_groups(open_checkpoint(tmp_path / "out").spec):
        assert len({found[module] for module in group}) == 1
    assert not result.warnings


def test_a_size_is_met_by_all_tensors_together(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=6)
    low, high = (
        converted(source, tmp_path / "none", to="gptq", bits=bits, group_size=32, dry_run=True).num_bytes
        for bits in (2, 8)
    )
    size = (low + high) // 2
    result = converted(source, tmp_path / "out", to="gptq", size=size, group_size=32, solver="rtn")
    assert 0.99 * size < result.num_bytes <= size
    record = json.loads((tmp_path / "out" / "aphroquant.json").read_text())
    assert record["request"]["size"] == size
    assert record["request"]["rules"] == []
    assert record["result"]["allocation"]["modules"]["model.layers.0.mlp.down_proj"] in ("2", "3", "4", "8")


def test_chosen_bits_are_better_than_the_same_number_spread_by_a_guess(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=6)
    chosen = converted(source, tmp_path / "chosen", to="gptq", bits=4.2, group_size=32, solver="rtn", effort="normal")
    modules = chosen.allocation["modules"]
    backwards = [f"{module}: bits={modules[other]}" for module, other in zip(modules, reversed(modules), strict=True)]
    converted(source, tmp_path / "other", to="gptq", bits=4, group_size=32, solver="rtn", rules=backwards)
    klds = [
        evaluate(tmp_path / name, against=source, windows=8, window_len=64).mean_kld for name in ("chosen", "other")
    ]
    assert klds[0] < klds[1]
    assert chosen.allocation["measured_kld"] <= chosen.allocation["measured_kld_before"]
    assert chosen.allocation["measured"] == 13


def test_estimates_are_near_what_single_layers_do(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The estimated divergence of one group's rounding against the true one, for small errors."""
    source = open_checkpoint(tiny_checkpoint("llama", num_hidden_layers=3))
    request = ConversionRequest("x", "gptq", tmp_path, bits=5.0, group_size=32, samples=24, seq_len=64, solver="rtn")
    problem = make_problem(source, request)
    windows = calibration_windows(source.tokenizer(), [TEXT], samples=24, seq_len=64, seed=0).windows
    pieces = PieceStore()
    passes = Sensitivity(problem, source, pieces, CPU, Progress())
    estimates = item_damages(problem, passes.damages(windows, 24, 0, quick=True))
    judge = MeasuredDivergence(source, windows, pieces, CPU)
    place = [problem.widths[number].label for number in problem.items[0].widths].index("4")
    ratios = []
    for item, own in zip(problem.items, estimates, strict=True):
        true = judge.of(dict.fromkeys(item.modules, item.widths[place]))
        ratios.append(own[place] / true)
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    pieces.close()


def test_nothing_changed_diverges_by_nothing_and_all_layers_by_something(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    problem = make_problem(source, ConversionRequest("x", "gptq", tmp_path, bits=5.0, group_size=32, solver="rtn"))
    windows = calibration_windows(source.tokenizer(), [TEXT], samples=4, seq_len=32, seed=0).windows
    pieces = PieceStore()
    Sensitivity(problem, source, pieces, CPU, Progress()).damages(windows, 2, 0, quick=True)
    judge = MeasuredDivergence(source, windows, pieces, CPU)
    assert judge.of({}) == pytest.approx(0, abs=1e-6)
    values = [judge.of(chosen_widths(problem.items, (number,) * len(problem.items))) for number in range(4)]
    assert values == sorted(values, reverse=True)
    pieces.close()


def test_the_same_request_makes_the_same_choice(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "gptq", "bits": 4.5, "group_size": 32, "solver": "rtn", "effort": "normal"}
    one, other = (converted(tiny_checkpoint("llama"), tmp_path / name, **options) for name in "ab")
    assert one.allocation == other.allocation


@pytest.mark.parametrize("named", [False, True], ids=["beside", "named"])
def test_chosen_bits_stay_in_the_job_of_an_interrupted_conversion(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    source = tiny_checkpoint("llama")
    options: dict[str, Any] = {"to": "gptq", "bits": 4.5, "group_size": 32, "solver": "gptq"}
    job = tmp_path / "job" if named else tmp_path / ".out.job"
    place = {"job": job} if named else {}
    first = converted(source, tmp_path / "undisturbed", **options)

    class StopError(Exception):
        pass

    def interrupted(*_: Any, **__: Any) -> Any:
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(walk, "load_calibration_block", interrupted)
        converted(source, tmp_path / "out", **options, **place)
    assert [path.suffix for path in job.iterdir() if path.name.startswith("bits-")] == [".json"]
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "Sensitivity", interrupted)
        with pytest.raises(StopError):
            converted(source, tmp_path / "out", **{**options, "bits": 5.0})
        again = converted(source, tmp_path / "out", **options, **place)
    assert again.allocation == first.allocation
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_a_damaged_choice_is_made_again(tmp_path: Path) -> None:
    kept = KeptChoices(tmp_path / "job")
    assert kept.take({"bits": 4.5}) is None
    kept.keep({"bits": 4.5}, {"choice": [0, 1]})
    assert kept.take({"bits": 4.5}) == {"choice": [0, 1]}
    assert kept.take({"bits": 4.6}) is None
    (path,) = (tmp_path / "job").iterdir()
    for content in ("", "[]", "{}", path.read_text().replace("1", "0")):
        path.write_text(content)
        assert kept.take({"bits": 4.5}) is None
    kept.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_experts_of_a_layer_get_the_same_bits(tiny_checkpoint: Tiny, tmp_path: Path, family: str) -> None:
    more = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32}}[family]
    source = tiny_checkpoint(family, num_hidden_layers=3, num_experts_per_tok=2, **more)
    result = converted(source, tmp_path / "out", to="compressed-tensors", bits=5.0, group_size=32)
    assert 4.5 < result.bits_per_weight <= 5.0
    found = bits_of(tmp_path / "out")
    for group in fused_groups(open_checkpoint(tmp_path / "out").spec):
        assert len({found[module] for module in group}) == 1


def test_gguf_types_are_chosen_for_layers_and_others_keep_theirs(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = tiny_checkpoint("llama", **sizes, head_dim=32)
    result = converted(source, tmp_path / "a.gguf", to="gguf", bits=4.5)
    assert 4.3 < result.bits_per_weight <= 4.5
    kinds = {module: report["type"] for module, report in result.modules.items()}
    assert kinds["lm_head"] == "Q6_K"
    assert {kinds[module] for module in result.allocation["modules"]} == set(result.allocation["widths"])


def test_what_users_rules_decide_is_not_chosen_and_counts(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=4)
    rules = ["layers[0]: bits=8", "layers[1].down: keep", "v: group_size=16", "lm_head: bits=8"]
    result = converted(source, tmp_path / "out", to="gptq", bits=6.5, group_size=32, solver="rtn", rules=rules)
    found, scheme = (
        bits_of(tmp_path / "out"),
        open_checkpoint(tmp_path / "out").schemes()["model.layers.2.self_attn.v_proj"],
    )
    assert all(found[module] == 8 for module in found if ".0." in module)
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["lm_head"] == 8
    assert isinstance(scheme, IntegerScheme)
    assert scheme.group_size == 16
    assert 6.2 < result.bits_per_weight <= 6.5


def test_a_dry_run_guesses_within_the_budget_and_says_so(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    result = converted(tiny_checkpoint("llama"), tmp_path / "out", to="gptq", bits=4.5, group_size=32, dry_run=True)
    assert result.bits_per_weight <= 4.5
    assert result.allocation["guessed"]
    assert result.notes[0].startswith("guessed bits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "awq", "bits": 3.5}, "--bits 3.5 needs a format that holds layers of different widths, which awq does"),
        ({"to": "gptq", "bits": 1.5}, "--bits 1.5: the least that gptq can hold is"),
        ({"to": "gptq", "bits": 3.5, "scheme": "w4a16"}, "--bits 3.5 chooses the bits of each layer, so that --scheme"),
        ({"to": "gptq", "bits": 4.5, "size": 10**6}, "--bits 4.5 chooses the bits of each layer, so that --size does"),
        ({"to": "gptq", "size": 1000}, "the tensors take"),
        ({"to": "gptq", "size": 0}, "size = 0 must be positive"),
        ({"to": "gptq", "bits": 0.5}, "bits = 0.5 on average must be between 1 and 32"),
        ({"to": "gptq", "bits": float("nan")}, "on average must be between"),
        ({"to": "gptq", "bits": 4.5, "samples": 0}, "choosing bits needs calibration text, but samples = 0"),
        ({"to": "gptq", "bits": 4.5, "rules": ["*: bits=4"]}, "leaves nothing to choose"),
        ({"to": "gptq", "bits": 4.5, "rules": ["lm_head: symmetric"]}, "a rule quantizes lm_head, but leaves its bits"),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_sentence(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        converted(tiny_checkpoint("llama"), tmp_path / "out", **options)
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_chosen_anew_only_with_requantize(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "four", to="gptq", bits=4, solver="rtn", samples=0)
    with pytest.raises(UsageError, match=r"--bits 5\.0 asks for others"):
        converted(tmp_path / "four", tmp_path / "out", to="gptq", bits=5.0)
    result = converted(tmp_path / "four", tmp_path / "out", to="gptq", bits=5.0, requantize=True, solver="rtn")
    assert result.bits_per_weight <= 5.0


def test_widths_that_engines_run_come_first_and_others_are_told_of(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "compressed-tensors", "group_size": 32, "dry_run": True}
    usual = converted(tiny_checkpoint("llama"), tmp_path / "out", bits=5.5, **options)
    assert set(usual.allocation["widths"]) <= {"4", "8"}
    assert not any("vLLM" in note for note in usual.notes)
    low = converted(tiny_checkpoint("llama"), tmp_path / "out", bits=3.9, **options)
    assert set(low.allocation["widths"]) - {"4", "8"}
    assert any(note.startswith("vLLM runs compressed-tensors of 4 and 8 bits only") for note in low.notes)
