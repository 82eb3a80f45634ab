"""Rotated channels: the same logits as the source's, in numbers that all of the conversion takes as they come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import rotated as module
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rotated import RotatedCheckpoint
from aphroquant.conversion.run import convert_all
from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation import evaluate
from aphroquant.models.streamed import StreamedModel

Tiny = Callable[..., Path]
EXACT = 1e-6  # of the largest logit: the rotated weights are stored in float32, and all else is float64
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one value head": ("llama", {"num_key_value_heads": 1}),
    "as many value heads": ("llama", {"num_key_value_heads": 4}),
    "sizes that are no powers of two": ("llama", {"hidden_size": 72, "head_dim": 12, "intermediate_size": 56}),
    "sizes without a Hadamard matrix": ("llama", {"hidden_size": 52, "head_dim": 14}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
}


def logits(checkpoint: Any) -> torch.Tensor:
    windows = torch.randint(0, 360, (2, 24), generator=torch.Generator().manual_seed(0))
    model = StreamedModel(checkpoint, torch.float64)
    return model.logits(model.hidden_states(windows).flatten(0, 1))


@pytest.mark.parametrize("case", CASES)
def test_rotating_leaves_the_logits_as_they_are(case: str, tiny_checkpoint: Tiny) -> None:
    family, overrides = CASES[case]
    source = open_checkpoint(tiny_checkpoint(family, **overrides))
    turned = RotatedCheckpoint(source, seed=1)
    expected, found = logits(source), logits(turned)
    assert float((found - expected).abs().max() / expected.abs().max()) < EXACT
    name = "model.layers.0.self_attn.v_proj.weight"
    assert float((turned.read(name) - source.read(name)).abs().max()) > 0.01
    assert torch.equal(turned.read("model.norm.weight"), torch.ones(source.spec.hidden_size))


def test_what_is_read_has_the_dtype_and_shape_that_headers_tell(tiny_checkpoint: Tiny) -> None:
    turned = RotatedCheckpoint(open_checkpoint(tiny_checkpoint("qwen2", torch_dtype="bfloat16")), seed=0)
    for name, info in turned.tensors.items():
        tensor = turned.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)


def test_a_conversion_of_a_tied_model_has_a_head_and_says_so(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    result = aphroquant.convert(
        source, to="gptq", bits=8, solver="rtn", samples=0, rotate=True, out=tmp_path / "out", seed=3
    )
    assert any("the head, tied to the embedding" in note for note in result.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert evaluate(tmp_path / "out", against=source, windows=2, window_len=32).mean_kld < 1e-3
    assert json.loads((tmp_path / "out" / "aphroquant.json").read_text())["request"]["rotate"] is True


def test_calibrated_conversions_work_on_rotated_channels(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, text = tiny_checkpoint("qwen2"), DEFAULT_TEXTS / "calibration_chat.jsonl"
    options: dict[str, Any] = {"to": "gptq", "group_size": 32, "samples": 8, "seq_len": 32, "calibration": text}
    aphroquant.convert(source, bits=4, rotate=True, out=tmp_path / "rotated", **options)
    aphroquant.convert(source, bits=2, out=tmp_path / "coarse", **options)
    found = [evaluate(tmp_path / name, against=source, windows=4, window_len=32) for name in ("rotated", "coarse")]
    assert found[0].mean_kld < 0.3 * found[1].mean_kld


def test_the_same_seed_rotates_to_the_same_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options: dict[str, Any] = {"to": "gptq", "solver": "rtn", "samples": 0, "rotate": True}
        aphroquant.convert(tiny_checkpoint("llama"), out=tmp_path / name, seed=seed, **options)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_families_that_it_is_not_exact_for_are_refused(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROTATABLE_FAMILIES", frozenset({"mistral"}))
    with pytest.raises(UsageError, match="--rotate is not exact for model_type llama"):
        RotatedCheckpoint(open_checkpoint(tiny_checkpoint("llama")), seed=0)


def test_quantized_sources_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    aphroquant.convert(tiny_checkpoint("llama"), to="gptq", solver="rtn", samples=0, out=tmp_path / "quantized")
    with pytest.raises(UsageError, match="quantized already, and --rotate needs dense safetensors"):
        aphroquant.convert(tmp_path / "quantized", to="awq", rotate=True, out=tmp_path / "out")


def test_tensors_that_nothing_is_known_of_are_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.zeros(64, 128)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"mtp\.fc\.weight is no part of a plain llama model"):
        aphroquant.convert(source, to="gptq", rotate=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_missing_is_not_made_of_the_embedding(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        aphroquant.convert(source, to="gptq", rotate=True, out=tmp_path / "out")


def test_rotated_models_are_written_as_gguf_too(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    aphroquant.convert(source, to="gguf", scheme="q8_0", rotate=True, out=tmp_path / "out.gguf")
    expected, found = (logits(open_checkpoint(path)).log_softmax(-1) for path in (source, tmp_path / "out.gguf"))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-3


def test_outputs_of_one_pass_share_their_rotation(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    plain = ConversionRequest(source=str(tiny_checkpoint("llama")), to="gptq", out=tmp_path / "a", samples=0)
    with pytest.raises(UsageError, match="are all rotated by one seed, or none is"):
        convert_all([plain, replace(plain, out=tmp_path / "b", rotate=True)])
