"""Checkpoints that our formats write with numbers that no option of `convert` asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.formats import format_class
from aphroquant.schemes import (
    AdditiveScheme,
    DenseScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)


def _mixed(module: str) -> Scheme:
    if "layers.0" in module:
        return IntegerScheme(8, None, symmetric=True)
    return DenseScheme(torch.float16) if "up_proj" in module else IntegerScheme(4, 32, symmetric=False)


SETTINGS: dict[str, tuple[str, Callable[[str], Scheme]]] = {
    "gptq-act-order": ("gptq", lambda module: IntegerScheme(4, 32, symmetric=False, act_order=True)),
    "gptq-act-order-symmetric": ("gptq", lambda module: IntegerScheme(4, 32, symmetric=True, act_order=True)),
    "gptq-mixed": ("gptq", _mixed),
    "aqlm-1x16": ("aqlm", lambda module: AdditiveScheme(1, 16)),
    "aqlm-2x8": ("aqlm", lambda module: AdditiveScheme(2, 8)),
    "nvfp4": ("compressed-tensors", lambda module: LookupScheme("e2m1", 16, "e4m3")),
    "mxfp4": ("compressed-tensors", lambda module: LookupScheme("e2m1", 32, "e8m0")),
    "modelopt-nvfp4": ("modelopt", lambda module: LookupScheme("e2m1", 16, "e4m3")),
    "integers-3": ("compressed-tensors", lambda module: IntegerScheme(3, 64, symmetric=True)),
}


def write(name: str, source: Path, out: Path) -> None:
    """The dense checkpoint `source` with random numbers of the named setting in its blocks."""
    generator = torch.Generator().manual_seed(0)
    opened = open_checkpoint(source)
    format_name, scheme_of = SETTINGS[name]
    schemes = {module: scheme_of(module) for module in opened.schemes() if module.endswith("_proj")}
    target = format_class(format_name).for_schemes(schemes, ["lm_head"])
    with CheckpointWriter(out) as writer:
        for stored in opened.tensors:
            scheme = schemes.get(stored.removesuffix(".weight"))
            if scheme is None or isinstance(scheme, DenseScheme):
                writer.add(stored, opened.read(stored))
        for module, scheme in schemes.items():
            if isinstance(scheme, DenseScheme):
                continue
            rows, columns = opened.info(f"{module}.weight").shape
            for suffix, tensor in target.write(module, random_weight(scheme, rows, columns, generator)).items():
                writer.add(target.place(module, suffix).name, tensor)
        for path in opened.carried_files():
            writer.add_file(path)
        for name_of_file, content in target.side_files().items():
            writer.write_json(name_of_file, content)
        writer.finish(opened.config | {"quantization_config": target.quantization_config()})


def random_weight(scheme: Scheme, rows: int, columns: int, generator: torch.Generator) -> QuantizedWeight:
    """Any codes, and scales that give weights of about 0.1."""
    tensors = {}
    for name, shape in scheme.shapes(rows, columns).items():
        tensors[name] = _random_tensor(scheme, name, shape, columns, generator)
    return QuantizedWeight(scheme, tensors, (rows, columns))


def _random_tensor(
    scheme: Scheme, name: str, shape: tuple[int, ...], columns: int, generator: torch.Generator
) -> torch.Tensor:
    if name == "group_index":
        assert isinstance(scheme, IntegerScheme)
        assert scheme.group_size is not None
        order = torch.randperm(columns, generator=generator)
        return (order.argsort() // scheme.group_size).to(torch.int32)
    dtype = scheme.dtypes().get(name, torch.float16)
    if name in ("codes", "zeros"):
        bits = scheme.storage_bits(name)
        assert bits is not None
        return torch.randint(0, 2**bits, shape, generator=generator).to(dtype)
    if name in ("global_scale", "input_scale"):
        return torch.tensor(2.0**-7, dtype=torch.float64)
    spread = 0.5 + torch.rand(shape, generator=generator)
    if isinstance(scheme, AdditiveScheme):
        if name == "codebooks":
            return torch.randn(shape, generator=generator).mul(0.1).to(dtype)
        return spread.to(dtype)
    return (spread if name == "scales" and dtype == torch.float8_e4m3fn else spread * _step(scheme)).to(dtype)


def _step(scheme: Scheme) -> float:
    """A scale for which the weights are about 0.1."""
    return 0.2 / 2**scheme.bits if isinstance(scheme, IntegerScheme) else 2.0**-5
