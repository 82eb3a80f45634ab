"""Whole conversions of tiny models: what is written is what was solved, and all else is carried over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.models.streamed import StreamedModel
from aphroquant.schemes import DenseScheme, FloatScheme, QuantizedWeight

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}
FLOAT_COMBINATIONS = [("fp8", f"fp8-{kind}") for kind in ("dynamic", "static", "block")]
COMBINATIONS = [
    *[
        (to, None, solver)
        for to in ("awq", "gptq", "compressed-tensors")
        for solver in ("rtn", "gptq", "awq", "awq-gptq")
    ],
    *[(to, scheme, None) for to, scheme in FLOAT_COMBINATIONS],
    *[("compressed-tensors", scheme, None) for _, scheme in FLOAT_COMBINATIONS],
    ("compressed-tensors", "w8a16", None),
    ("compressed-tensors", "w8a8-int8", "gptq"),
    ("gptq", "w3a16", None),
    ("aqlm", "2x5", None),
]


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, QuantizedWeight]:
    """Collects what the solvers produce on the way to the writer."""
    weights: dict[str, QuantizedWeight] = {}

    from aphroquant.conversion.directory_run import DirectoryConversion

    take = DirectoryConversion.take

    def watched(self: DirectoryConversion, block: SolvedBlock) -> None:
        weights.update({name: solution.weight for name, solution in block.solutions.items()})
        take(self, block)

    monkeypatch.setattr(DirectoryConversion, "take", watched)
    return weights


@pytest.mark.parametrize(("to", "scheme", "solver"), COMBINATIONS)
def test_the_written_checkpoint_holds_what_the_solver_produced(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    solved: dict[str, QuantizedWeight],
    to: str,
    scheme: str | None,
    solver: str | None,
) -> None:
    source = tiny_checkpoint("llama")
    result = converted(source, tmp_path / "out", to=to, scheme=scheme, solver=solver)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format_name == to
    assert set(solved) == set(checkpoint.spec.modules())
    for module, weight in solved.items():
        stored = checkpoint.weight(module)
        assert stored.scheme == weight.scheme
        assert torch.equal(stored.dequantize(), weight.dequantize()), module
    assert result.num_modules == 14
    assert result.num_bytes == checkpoint.num_bytes
    assert 0 < (result.mean_relative_error or 0) < 0.1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_converts_and_still_computes_nearly_the_same(
    tiny_checkpoint: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family)
    converted(source, tmp_path / "out", to="gptq", bits=8, solver="awq-gptq")
    windows = torch.randint(0, 300, (2, 24))
    logits = []
    for path in (source, tmp_path / "out"):
        model = StreamedModel(open_checkpoint(path))
        logits.append(model.logits(model.hidden_states(windows).flatten(0, 1)))
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.03


def test_what_is_not_quantized_is_carried_byte_for_byte(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2", torch_dtype="bfloat16")
    converted(source, tmp_path / "out", to="compressed-tensors", solver="gptq", ignore=["o_proj"])
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    quantized = {name for name, scheme in after.schemes().items() if not isinstance(scheme, DenseScheme)}
    assert len(quantized) == 12
    for name in before.tensors:
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(before.read(name).view(torch.int16), after.read(name).view(torch.int16)), name
    for path in before.carried_files():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert after.config == before.config


def test_scales_of_bfloat16_models_are_bfloat16_in_compressed_tensors_and_float16_elsewhere(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    for to, dtype in (("compressed-tensors", torch.bfloat16), ("awq", torch.float16)):
        converted(source, tmp_path / to, to=to, solver="rtn", samples=0)
        weight = open_checkpoint(tmp_path / to).weight("model.layers.0.self_attn.q_proj")
        assert weight["scales"].dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bitsandbytes_computes_in_the_model_s_dtype(tiny_checkpoint: Tiny, tmp_path: Path, dtype: str) -> None:
    aphroquant.convert(tiny_checkpoint("llama", torch_dtype=dtype), to="bitsandbytes", out=tmp_path / "out")
    assert quantization_config(tmp_path / "out")["bnb_4bit_compute_dtype"] == dtype


def test_the_dtype_of_a_model_whose_config_has_none_is_that_of_its_numbers(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(config))
    aphroquant.convert(source, to="bitsandbytes", out=tmp_path / "out")
    assert quantization_config(tmp_path / "out")["bnb_4bit_compute_dtype"] == "float16"


def quantization_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def test_awq_changes_norms_and_nothing_else_that_is_dense(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", torch_dtype="float16")
    converted(source, tmp_path / "out", to="awq", solver="awq")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    changed = [name for name in after.dense_names() if not torch.equal(before.read(name), after.read(name))]
    assert changed
    assert all(name.endswith("layernorm.weight") for name in changed)
    assert all(after.tensors[name].dtype == before.tensors[name].dtype for name in after.dense_names())


def test_tied_embeddings_stay_tied(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama", tie_word_embeddings=True), tmp_path / "out", to="gptq", solver="rtn", samples=0)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert not checkpoint.has("lm_head.weight")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        converted(source, tmp_path / name, to="gptq", seed=seed)
        files = digests(tmp_path / name)
        for name_of_output in ("aphroquant.json", "README.md", "SHA256SUMS"):  # which hold its name, or times
            del files[name_of_output]
        record = json.loads((tmp_path / name / "aphroquant.json").read_text())
        found.append((files, {key: record[key] for key in ("request", "calibration", "result")}))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_static_fp8_scales_cover_the_greatest_input(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="fp8", scheme="fp8-static")
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = [float(checkpoint.weight(module)["input_scale"]) for module in checkpoint.spec.modules()]
    assert all(0 < scale < 1 for scale in scales)
    assert scales[0] == scales[1] == scales[2]  # q, k and v read the same input
    assert isinstance(checkpoint.schemes()["model.layers.0.mlp.up_proj"], FloatScheme)


def test_the_manifest_tells_how_it_was_made(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Words and more words, one after the other. " * 100)
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="gptq", calibration=text, seed=5)
    record = json.loads((tmp_path / "out" / "aphroquant.json").read_text())
    assert record["request"]["seed"] == 5
    assert record["calibration"]["sources"][0]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["calibration"]["windows"] == [8, 32]
    module = record["result"]["modules"]["model.layers.0.self_attn.q_proj"]
    assert module["damping"] > 0
    assert module["proxy_loss"] > 0
    assert set(record["result"]["scaling"]["model.layers.0"]) == {"qkv", "o", "gate_up", "down"}
    assert record["timings"]["seconds"] > 0


def test_calibrated_solvers_beat_plain_rounding_on_the_layers_outputs(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    errors = {
        solver: converted(
            tiny_checkpoint("llama"), tmp_path / solver, to="gptq", bits=3, solver=solver
        ).mean_relative_error
        for solver in ("rtn", "gptq", "awq-gptq")
    }
    assert (errors["gptq"] or 1) < (errors["rtn"] or 0)
    assert (errors["awq-gptq"] or 1) < (errors["rtn"] or 0)


def test_hidden_states_in_a_file_give_the_same_result(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "memory", to="awq")
    from aphroquant.conversion import activations, blocks, source_pass

    original = activations.Activations

    def spilling(num_tokens: int, width: int, **limits: Any) -> Any:
        return original(num_tokens, width, memory_limit=0)

    for module in (activations, blocks, source_pass):
        monkeypatch.setattr(module, "Activations", spilling)
    result = converted(tiny_checkpoint("llama"), tmp_path / "file", to="awq")
    assert "temporary file" in result.notes[0]
    name = "model.safetensors"
    assert digests(tmp_path / "memory")[name] == digests(tmp_path / "file")[name]
