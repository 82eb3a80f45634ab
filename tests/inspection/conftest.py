"""Checkpoints of every format from one tiny dense model, its weights quantized in the plainest way, ready to damage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from aphroquant.calibration.fp8 import quantize_fp8
from aphroquant.calibration.integer_grid import min_max_grid, quantize, to_quantized_weight
from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.formats import format_class
from aphroquant.formats.base import Format
from aphroquant.schemes import (
    AdditiveScheme,
    AffineScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

Maker = Callable[..., Path]
Damage = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]


@pytest.fixture
def quantized(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Maker:
    """`quantized(format_name, scheme, name="q", skip="-", damage=None, **format_options)`: a directory.

    `scheme` may be a function from module names to schemes; modules whose names hold `skip` stay dense.
    """

    def make(
        format_name: str,
        scheme: Scheme | Callable[[str], Scheme],
        name: str = "q",
        skip: str = "-",
        family: str = "llama",
        **options: Any,
    ) -> Path:
        source = open_checkpoint(tiny_checkpoint(family))
        modules = [module for module in source.spec.modules() if skip not in module]
        schemes = {module: scheme(module) if callable(scheme) else scheme for module in modules}
        dense = [module for module in source.schemes() if module not in schemes]
        written: Format = format_class(format_name).for_schemes(schemes, dense, **options)
        with CheckpointWriter(tmp_path / name) as writer:
            for tensor in source.tensors:
                module = tensor.removesuffix(".weight")
                if module not in schemes:
                    writer.add(tensor, source.read(tensor))
                    continue
                weight = rounded(source.read(tensor), schemes[module])
                for suffix, stored in written.write(module, weight).items():
                    writer.add(f"{module}.{suffix}", stored)
            for file in source.carried_files():
                writer.add_file(file)
            return writer.finish(source.config | {"quantization_config": written.quantization_config()})

    return make


@pytest.fixture
def damage() -> Callable[[Path, Damage], Path]:
    """`damage(directory, change)`: rewrite the tensors of the only shard; `change` edits or returns them."""

    def apply(path: Path, change: Damage) -> Path:
        file = path / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        changed = change(tensors)
        safetensors.torch.save_file(dict(changed) if isinstance(changed, dict) else tensors, file, {"format": "pt"})
        return path

    return apply


@pytest.fixture
def edit() -> Callable[..., Path]:
    """`edit(directory, **keys)`: change config.json; `quantization` updates its quantization_config."""

    def apply(path: Path, quantization: Mapping[str, Any] | None = None, **keys: Any) -> Path:
        config = json.loads((path / "config.json").read_text())
        if quantization is not None:
            config["quantization_config"] |= quantization
        (path / "config.json").write_text(json.dumps(config | keys))
        return path

    return apply


def rounded(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """The weight in a scheme, by its ranges alone."""
    weight = weight.float()
    if isinstance(scheme, IntegerScheme):
        grid = min_max_grid(weight, scheme)
        return to_quantized_weight(quantize(weight, grid, scheme), grid, scheme)
    if isinstance(scheme, FloatScheme):
        return quantize_fp8(weight, scheme)
    shape = (weight.shape[0], weight.shape[1])
    makers = {LookupScheme: _looked_up, AffineScheme: _affine, AdditiveScheme: _additive}
    return QuantizedWeight(scheme, makers[type(scheme)](weight, scheme), shape)


def _looked_up(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    table = scheme.table_values()
    blocks = weight.reshape(-1, scheme.block_size)
    scales = blocks.abs().amax(1, keepdim=True) / table.abs().max()
    extra = {}
    if scheme.scales == "e8m0":
        scales = torch.exp2(scales.log2().ceil())
        stored = scales.to(torch.float8_e8m0fnu)
    elif scheme.scales == "e4m3":
        extra["global_scale"] = (scales.max() / 448).double()
        stored = (scales / extra["global_scale"]).to(torch.float8_e4m3fn)
        scales = stored.float() * extra["global_scale"].float()
    else:
        stored = scales
    codes = ((blocks / scales)[..., None] - table).abs().argmin(-1).to(torch.uint8).view(weight.shape)
    return {
        "codes": codes,
        "scales": stored.flatten() if scheme.flattened else stored.view(weight.shape[0], -1),
        **extra,
    }


def _affine(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    groups = weight.reshape(-1, scheme.group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low) / (2**scheme.bits - 1)
    codes = ((groups - low) / scales).round().clamp(0, 2**scheme.bits - 1).to(torch.uint8).view(weight.shape)
    return {"codes": codes, "scales": scales.flatten().half(), "zeros": (-low / scales).flatten().half()}


def _additive(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    shapes = scheme.shapes(*weight.shape)
    return {
        "codes": torch.randint(0, 2**scheme.code_bits, shapes["codes"], dtype=torch.uint8),
        "codebooks": torch.randn(shapes["codebooks"]).half(),
        "scales": weight.std(1).half(),
    }
