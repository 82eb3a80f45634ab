"""Which schemes a GGUF file can hold to the last bit, and their numbers in a type's own terms.

A scale of a larger group is repeated for each of its blocks. Integer zero points move into the codes: code - zero
stands for the same number around the fixed zero of a symmetric type, if that has room for it on both sides:

    symmetric   1-4 bits -> Q4_0    5 bits -> Q5_0    6-8 bits -> Q8_0
    asymmetric  1-3 bits -> Q4_0    4 bits -> Q5_0    5-7 bits -> Q8_0    (8 bits need nine)
    with offsets  1-4 bits -> Q4_1    5 bits -> Q5_1
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.formats.gguf.block_types import BLOCK, BLOCK_TYPES, BlockType, block_type
from aphroquant.formats.writing import REQUANTIZE, exact_cast
from aphroquant.schemes import DenseScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

_SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}  # by the bits of a code around its zero
_WITH_OFFSETS = {4: "Q4_1", 5: "Q5_1"}


def exact_type(module: str, scheme: Scheme, columns: int) -> BlockType:
    """The type that holds rows of `columns` numbers of `scheme` exactly. UsageError saying why there is none.

    Scales in bfloat16 or float32 may still turn out not to fit float16: `in_type` finds that."""
    if isinstance(scheme, IntegerScheme):
        found = block_type(_integer_type(module, scheme))
        _check_groups(module, scheme, columns)
    else:
        weight_only = _without_activations(module, scheme)
        fitting = [kind for kind in BLOCK_TYPES.values() if kind.scheme == weight_only]
        if not fitting:
            raise UsageError(f"{module}: GGUF has no type for {scheme}", hint=REQUANTIZE)
        found = fitting[0]
    if columns % found.block_size:
        raise UsageError(
            f"{module}: {found.name} needs rows that are a multiple of {found.block_size}, not {columns}",
            hint=REQUANTIZE,
        )
    return found


def in_type(module: str, weight: QuantizedWeight, target: BlockType) -> QuantizedWeight:
    """The same numbers in the scheme of `target`, which `exact_type` gave. UsageError if a scale does not fit."""
    scheme = weight.scheme
    if isinstance(scheme, DenseScheme):
        return weight
    if isinstance(scheme, LookupScheme) and scheme.scales == "e4m3":
        _check_unsigned(module, weight["scales"])
    if not isinstance(scheme, IntegerScheme):
        tensors = dict(weight.tensors)
        if scheme == block_type("IQ4_NL").scheme:
            tensors["scales"] = exact_cast("GGUF", module, "scales", weight["scales"], torch.float16)
        return QuantizedWeight(target.scheme, tensors, weight.shape)
    groups = _block_groups(module, weight)
    assert isinstance(target.scheme, IntegerScheme)
    codes = _codes(module, weight, groups, target.scheme)
    tensors = {"codes": codes, "scales": _per_block(module, weight, "scales", groups)}
    if scheme.has_offsets:
        tensors["offsets"] = _per_block(module, weight, "offsets", groups)
    return QuantizedWeight(target.scheme, tensors, weight.shape)


def _integer_type(module: str, scheme: IntegerScheme) -> str:
    if scheme.activations is not None:
        raise UsageError(f"{module}: GGUF has no quantized inputs, which {scheme} needs", hint=REQUANTIZE)
    if scheme.act_order:
        raise UsageError(f"{module}: GGUF has no order of columns, which {scheme} needs", hint=REQUANTIZE)
    types = _WITH_OFFSETS if scheme.has_offsets else _SYMMETRIC
    needed = scheme.bits if scheme.symmetric or scheme.has_offsets else scheme.bits + 1
    bits = next((width for width in types if needed <= width), None)
    if bits is None:
        kind = "offsets" if scheme.has_offsets else "zero points"
        raise UsageError(
            f"{module}: GGUF holds at most {max(types)} bits with {kind} exactly, and {scheme} needs {needed}",
            hint=REQUANTIZE,
        )
    return types[bits]


def _check_groups(module: str, scheme: IntegerScheme, columns: int) -> None:
    if scheme.group_size is not None and scheme.group_size % BLOCK and scheme.num_groups(columns) > 1:
        raise UsageError(
            f"{module}: a block of {BLOCK} has one scale in GGUF, and groups of {scheme.group_size} cut through it",
            hint=REQUANTIZE,
        )


def _without_activations(module: str, scheme: Scheme) -> Scheme:
    if getattr(scheme, "activations", None) is not None:
        raise UsageError(f"{module}: GGUF has no quantized inputs, which {scheme} needs", hint=REQUANTIZE)
    return scheme


def _check_unsigned(module: str, scales: Tensor) -> None:
    """NVFP4's scales have no sign here, and no other code than zero for what is no number."""
    if (scales.view(torch.uint8) >= 0x7F).any():
        raise UsageError(
            f"{module}: a scale is negative or not a number, which GGUF's NVFP4 cannot hold", hint=REQUANTIZE
        )


def _block_groups(module: str, weight: QuantizedWeight) -> Tensor:
    """The group of every block, int64 [K / 32]."""
    groups = weight.group_index().view(-1, BLOCK)
    assert bool((groups == groups[:, :1]).all()), f"{module}: groups cut through blocks"
    return groups[:, 0]


def _per_block(module: str, weight: QuantizedWeight, name: str, groups: Tensor) -> Tensor:
    return exact_cast("GGUF", module, name, weight[name], torch.float16)[:, groups]


def _codes(module: str, weight: QuantizedWeight, groups: Tensor, target: IntegerScheme) -> Tensor:
    """uint8 [N, K] around the target's zero."""
    scheme = weight.scheme
    assert isinstance(scheme, IntegerScheme)
    codes, wide = weight["codes"], f"{module}: codes or zero points are wider than the {scheme.bits} bits of {scheme}"
    if codes.numel() and int(codes.max()) >= 2**scheme.bits:
        raise UsageError(wide)
    if scheme.has_offsets:
        return codes
    if scheme.symmetric:
        return codes.add(2 ** (target.bits - 1) - 2 ** (scheme.bits - 1))
    zeros = weight["zeros"].short()[:, groups] - 2 ** (target.bits - 1)  # [N, K / 32]
    moved: Tensor = codes.reshape(*zeros.shape, BLOCK) - zeros[..., None]
    if moved.numel() and not 0 <= int(moved.min()) <= int(moved.max()) < 2**target.bits:
        raise UsageError(wide)
    return moved.to(torch.uint8).reshape(codes.shape)
