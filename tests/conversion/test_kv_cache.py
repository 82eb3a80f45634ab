"""Scales of a quantized KV cache go along, and the target's config says that they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aphroquant

Tiny = Callable[..., Path]
PER_HEAD = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}


@pytest.fixture
def source(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A model with cache scales."""
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for layer in (0, 1):
        for which in ("k", "v"):
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([0.25 + layer])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def written(source: Path, to: str, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    out = source.parent / to
    aphroquant.convert(source, to=to, out=out, samples=0, **options)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return config, load_file(out / "model.safetensors")


@pytest.mark.parametrize("to", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_the_scales_are_carried(source: Path, to: str) -> None:
    _, tensors = written(source, to)
    assert tensors["model.layers.1.self_attn.v_scale"].tolist() == [1.25]


def test_compressed_tensors_describes_them(source: Path) -> None:
    scheme = written(source, "compressed-tensors")[0]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")


def test_incomplete_scales_are_not_announced(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert written(source, "compressed-tensors")[0]["kv_cache_scheme"] is None


@pytest.mark.parametrize("options", [{}, {"bits": 8}], ids=["repacked", "quantized anew"])
def test_the_sources_own_description_is_kept(source: Path, options: dict[str, Any]) -> None:
    written(source, "compressed-tensors")
    first = source.parent / "compressed-tensors"
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = PER_HEAD
    (first / "config.json").write_text(json.dumps(config))
    again = source.parent / "again"
    aphroquant.convert(first, to="compressed-tensors", out=again, samples=0, requantize=True, **options)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] == PER_HEAD
