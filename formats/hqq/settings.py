"""HQQ's settings: in `quantization_config`, and beside each weight as small tensors of numbers and letters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats.hqq.packing import BITS, Packing, packing_of
from aphroquant.schemes import AffineScheme

PARAMETERS = "weight_quant_params"
TERNARY_BITS = 1.58  # codes 0, 1 and 2, packed as two bits
MAX_TEXT = 64
# Stored beside the numbers of a weight. Those of meta-data that is moved about say nothing about the numbers.
NAMES = (
    *("nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
    *("packing", "unpack_view_dtype", "compute_dtype"),
)


def scheme_of(parameters: Mapping[str, Any], where: str) -> AffineScheme:
    """The scheme of one `weight_quant_params`."""
    where = f"quantization_config: {where}.{PARAMETERS}"
    bits = 2 if parameters.get("nbits") == TERNARY_BITS else parameters.get("nbits")
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{where}: nbits = {bits!r} must be one of {', '.join(map(str, BITS))}")
    size, axis = parameters.get("group_size"), parameters.get("axis", 0)
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{where}: group_size = {size!r} must be a positive integer or null")
    if type(axis) is not int or axis not in (0, 1):
        raise InputError(f"{where}: axis = {axis!r} must be 0 or 1")
    return AffineScheme(bits, size, cast(Literal[0, 1], axis))


def to_config(scheme: AffineScheme) -> dict[str, Any]:
    """The entry of `quant_config`. Inverse of `scheme_of`."""
    parameters = {
        "nbits": scheme.bits,
        "channel_wise": True,
        "group_size": scheme.group_size,
        "optimize": True,
        "round_zero": False,
        "axis": scheme.axis,
        "view_as_float": False,
    }
    return {PARAMETERS: parameters, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


def to_tensors(scheme: AffineScheme, group_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the library stores beside the numbers of a weight, encoded as it encodes it."""
    packing = packing_of(scheme.bits)
    numbers = {"nbits": scheme.bits, "group_size": group_size, "axis": scheme.axis}
    flags = {
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
    }
    texts = {"packing": packing.name, "unpack_view_dtype": str(packing.dtype), "compute_dtype": str(dtype)}
    return (
        {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
        | {name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()}
        | {name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in texts.items()}
    )


def check_tensors(module: str, scheme: AffineScheme, group_size: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a weight whose own settings contradict `quantization_config`. Absent ones (older files) agree."""
    packing: Packing = packing_of(scheme.bits)
    numbers = {"nbits": scheme.bits, "axis": scheme.axis, "group_size": group_size, "quant_scale": 0, "quant_zero": 0}
    for name, value in numbers.items():
        found = _number(tensors, name, value)
        ternary = name == "nbits" and scheme.bits == 2 and math.isclose(found, TERNARY_BITS, rel_tol=1e-6)
        if found != value and not ternary:
            raise InputError(f"{module}.{name} is {found:g}, but quantization_config and the other tensors say {value}")
    found_packing = _text(module, tensors, "packing", packing.name)
    if found_packing != packing.name:
        raise InputError(f"{module}.packing is {found_packing!r}, but {scheme.bits} bits need {packing.name!r}")


def _number(tensors: Mapping[str, Tensor], name: str, default: float) -> float:
    """A setting stored as a tensor of one number; NaN if it is anything else."""
    if name not in tensors:
        return default
    return float(tensors[name]) if tensors[name].numel() == 1 else math.nan


def _text(module: str, tensors: Mapping[str, Tensor], name: str, default: str) -> str:
    """A setting stored as the codes of its letters."""
    if name not in tensors:
        return default
    letters = tensors[name]
    if letters.dtype != torch.uint8 or letters.ndim != 1 or letters.numel() > MAX_TEXT:
        raise InputError(f"{module}.{name} must be at most {MAX_TEXT} letters as uint8")
    return "".join(chr(letter) for letter in letters.tolist())
