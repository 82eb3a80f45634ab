"""A dry run foretells what a conversion would write, or why it would fail, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult
from aphroquant.errors import InputError, UsageError

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("to", "scheme"), [("awq", None), ("gptq", None), ("fp8", "fp8-block"), ("compressed-tensors", "w8a8-int8")]
)
def test_a_dry_run_writes_nothing_and_foretells_the_size(
    tiny_checkpoint: Tiny, tmp_path: Path, to: str, scheme: str | None
) -> None:
    options: dict[str, Any] = {"to": to, "scheme": scheme, "samples": 0}
    told = converted(tiny_checkpoint("llama"), tmp_path / "out", dry_run=True, **options)
    assert not list(tmp_path.iterdir())
    assert told.dry_run
    made = converted(tiny_checkpoint("llama"), tmp_path / "out", **options)
    assert told.num_bytes == made.num_bytes == open_checkpoint(tmp_path / "out").num_bytes
    assert told.bits_per_weight == made.bits_per_weight


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1e-30, UsageError, r"mlp\.up_proj: scales\[2, 1\] = .*e-31 is below the range of float16"),
        (1e30, UsageError, r"mlp\.up_proj: scales\[2, 1\] = 1\.0.*e\+30 is beyond the largest float16"),
        (float("nan"), InputError, r"model\.layers\.1\.mlp\.up_proj holds NaN or infinite values"),
    ],
)
def test_a_dry_run_looks_at_every_scale(
    value: float, error: type[Exception], message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", torch_dtype="bfloat16")
    converted(source, tmp_path / "one", to="compressed-tensors", samples=0, solver="rtn", group_size=32)
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][2, 1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        aphroquant.convert(tmp_path / "one", to="awq", out=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("scheme", ["f16", "q8_0"])
def test_bitsandbytes_of_a_gguf_file_has_one_dense_dtype(scheme: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """transformers leaves dense tensors as they are stored, and a float32 norm does not multiply a float16 head."""
    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=512)
    aphroquant.convert(source, to="gguf", scheme=scheme, out=tmp_path / "m.gguf")
    options: dict[str, Any] = {"to": "bitsandbytes", "requantize": True, "samples": 0, "solver": "rtn"}
    told = aphroquant.convert(tmp_path / "m.gguf", out=tmp_path / "out", dry_run=True, **options)
    made = aphroquant.convert(tmp_path / "m.gguf", out=tmp_path / "out", **options)
    found, before = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "m.gguf")
    assert {found.info(name).dtype for name in found.dense_names()} == {torch.float32}
    assert torch.equal(found.read("lm_head.weight"), before.read("lm_head.weight").float())
    assert told.num_bytes == made.num_bytes == found.num_bytes


def test_a_dry_run_computes_scales_that_a_format_stores_otherwise(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """bitsandbytes keeps 127 scales in one number, so that few of its scales are float16 numbers."""
    aphroquant.convert(tiny_checkpoint("llama", torch_dtype="float16"), to="bitsandbytes", out=tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.SCB"][3] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj: scales\[3\] = 0\.00787.* is between two numbers of float16"):
        aphroquant.convert(tmp_path / "one", to="gptq", out=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize(("hidden_size", "noted"), [(96, True), (128, False)])
def test_blocks_cut_short_by_the_edge_of_a_layer_are_told(
    tiny_checkpoint: Tiny, tmp_path: Path, hidden_size: int, noted: bool
) -> None:
    widths = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 128}
    source = tiny_checkpoint("llama", hidden_size=hidden_size, **widths)
    result = converted(source, tmp_path / "out", to="fp8", scheme="fp8-block", dry_run=True)
    assert any("no whole number of blocks" in note for note in result.notes) == noted


def test_one_pattern_need_not_be_a_list(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    result = converted(tiny_checkpoint("llama"), tmp_path / "out", to="fp8", ignore="o_proj", dry_run=True)
    assert result.num_modules == 12
