"""Sources that are damaged, incomplete or in the way: named before any work, and nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.errors import InputError, UsageError
from aphroquant.numbers import is_finite

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}
WITHOUT_DATA: dict[str, Any] = {"samples": 0}


@pytest.fixture
def source(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))


def change(source: Path, apply: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    apply(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [QUICK, WITHOUT_DATA], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"],
)
def test_a_damaged_tensor_that_is_only_carried_is_named(
    source: Path, name: str, options: dict[str, Any], value: float
) -> None:
    change(source, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    with pytest.raises(InputError, match=f"{name} holds NaN or infinite values"):
        aphroquant.convert(source, to="gptq", out=source.parent / "out", **options)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("solver", ["gptq", "awq"])
def test_activations_that_overflow_are_named(source: Path, solver: str) -> None:
    change(source, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(3e38))
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj: its input is not finite"):
        aphroquant.convert(source, to="gptq", solver=solver, out=source.parent / "out", **QUICK)


def test_a_weight_too_large_for_its_scale_is_named(source: Path) -> None:
    change(source, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(1e30))
    with pytest.raises(InputError, match=r": model\.layers\.1\.mlp\.down_proj: a weight is too large"):
        aphroquant.convert(source, to="gptq", out=source.parent / "out", samples=0)


def test_a_weight_too_large_for_a_search_of_channel_scales_is_named(source: Path) -> None:
    change(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e30))
    with pytest.raises(InputError, match=r": model\.layers\.1\.mlp\.\w+(, [\w.]+)?: a weight is too large"):
        aphroquant.convert(source, to="gptq", out=source.parent / "out", **QUICK)


def test_an_input_too_large_for_its_scale_is_named(source: Path) -> None:
    change(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e36))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: .* is (too large|not finite)"):
        aphroquant.convert(source, to="modelopt", scheme="nvfp4", out=source.parent / "out", **QUICK)


@pytest.mark.parametrize(("target", "options"), [("fp8", {}), ("compressed-tensors", {"scheme": "nvfp4a16"})])
def test_weights_whose_squares_overflow_are_named(source: Path, target: str, options: dict[str, Any]) -> None:
    change(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e36))
    with pytest.raises(InputError, match=r": model\.layers\.1\.mlp\.up_proj: its weights are too large"):
        aphroquant.convert(source, to=target, solver="mse", out=source.parent / "out", **options)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_found_even_by_a_dry_run(source: Path, name: str) -> None:
    change(source, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"{name} is missing"):
        aphroquant.convert(source, to="awq", out=source.parent / "out", dry_run=True)


def test_damaged_scales_are_not_repacked(source: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    aphroquant.convert(source, to="gptq", out=quantized, samples=0)
    change(quantized, lambda tensors: tensors["model.layers.0.mlp.up_proj.scales"].view(-1)[0].fill_(torch.nan))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj holds NaN"):
        aphroquant.convert(quantized, to="awq", out=tmp_path / "out")


@pytest.mark.parametrize("place", ["source", "source/.", "."])
def test_the_source_is_never_overwritten(source: Path, place: str) -> None:
    with pytest.raises(UsageError, match="holds the source"):
        aphroquant.convert(source, to="awq", out=source.parent / place, overwrite=True, **WITHOUT_DATA)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize(("to", "place"), [("awq", "out"), ("gguf", "deeper/model.gguf"), ("gguf", "deeper")])
def test_nothing_is_written_into_the_source(source: Path, to: str, place: str) -> None:
    before = sorted(source.rglob("*"))
    with pytest.raises(UsageError, match=r"is inside the source .*, which a conversion leaves as it is") as caught:
        aphroquant.convert(source, to=to, out=source / place, **WITHOUT_DATA)
    assert f"as {source}-quantized" in str(caught.value.hint)
    assert sorted(source.rglob("*")) == before


def test_a_family_of_unknown_shape_is_still_repacked(source: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    aphroquant.convert(source, to="gptq", out=quantized, samples=0)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    assert aphroquant.convert(quantized, to="awq", out=tmp_path / "out").mode == "repack"


def test_numbers_of_every_width_are_looked_at() -> None:
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_a_vector_of_another_length_is_refused_before_any_work(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.ones(0)}, path)
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \[0\], and config\.json wants \[\d+\]"):
        aphroquant.convert(source, to="gptq", out=source.parent / "out", **QUICK)
    assert [path.name for path in source.parent.iterdir()] == ["source"]
