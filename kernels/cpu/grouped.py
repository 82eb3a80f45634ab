"""One vocabulary for all quantized weights: codes with a scale, and a zero point or an offset, for groups of columns.

Schemes that fit no groups along a row become dense. Weights that read the same input are joined (q, k, v; gate, up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aphroquant.kernels.cpu.abi import DENSE_KINDS
from aphroquant.schemes import (
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
)


@dataclass(frozen=True)
class GroupedWeight:
    """Codes in groups of columns, or dense rows.

    codes: (codes - zeros) * scales, or codes * scales + offsets; with a `table`, table[codes] * scales.
    fp8: e4m3 codes * scales.
    """

    kind: Literal["codes", "fp8", "dense"]
    bits: int
    codes: Tensor  # codes, fp8: uint8 [N, K]; dense: the weight
    group_index: Tensor  # int64 [K]
    scales: Tensor | None = None  # [N, G]
    zeros: Tensor | None = None  # uint8 [N, G]
    offsets: Tensor | None = None  # [N, G]
    table: Tensor | None = None  # [16]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def joins(self, other: GroupedWeight) -> bool:
        """Whether the two can be stacked into one weight."""
        return (
            self._kind() == other._kind()
            and _same(self.group_index, other.group_index)
            and _same(self.table, other.table)
        )

    def _kind(self) -> tuple[object, ...]:
        return self.kind, self.bits, self.codes.dtype, self.codes.shape[1], self.offsets is None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def join(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    """The outputs of all weights, one after the other."""
    first = weights[0]
    if len(weights) == 1:
        return first

    def stack(name: str) -> Tensor | None:
        parts = [getattr(weight, name) for weight in weights]
        return None if parts[0] is None else torch.cat(parts)

    codes = stack("codes")
    assert codes is not None
    return replace(first, codes=codes, scales=stack("scales"), zeros=stack("zeros"), offsets=stack("offsets"))


def grouped(weight: QuantizedWeight) -> GroupedWeight:
    """The weight in terms of groups; dense if its groups do not run along rows."""
    match weight.scheme:
        case DenseScheme():
            return _dense(weight["weight"])
        case IntegerScheme() as scheme:
            return _integer(weight, scheme)
        case KQuantScheme() as scheme:
            return _kquant(weight, scheme)
        case FloatScheme() as scheme if scheme.dtype == torch.float8_e4m3fn:
            return _float8(weight, scheme)
        case LookupScheme() as scheme if not scheme.flattened or weight.shape[1] % scheme.block_size == 0:
            return _lookup(weight, scheme)
        case AffineScheme() as scheme if scheme.axis == 1 and weight.shape[1] % (scheme.group_size or 1) == 0:
            return _affine(weight, scheme)
        case _:
            return _dense(weight.dequantize())


def _dense(weight: Tensor) -> GroupedWeight:
    weight = weight if weight.dtype in DENSE_KINDS else weight.float()
    return GroupedWeight("dense", 0, weight.contiguous(), _groups_of(weight.shape[1], None))


def _groups_of(in_features: int, group_size: int | None) -> Tensor:
    return torch.arange(in_features) // (group_size or in_features)


def _integer(weight: QuantizedWeight, scheme: IntegerScheme) -> GroupedWeight:
    codes, scales, index = weight["codes"], weight["scales"], weight.group_index()
    if scheme.has_offsets:
        return GroupedWeight("codes", scheme.bits, codes, index, scales, offsets=weight["offsets"])
    middle = torch.full(scales.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    return GroupedWeight("codes", scheme.bits, codes, index, scales, middle if scheme.symmetric else weight["zeros"])


def _affine(weight: QuantizedWeight, scheme: AffineScheme) -> GroupedWeight:
    n, k = weight.shape
    scales, zeros = (weight[name].float().reshape(n, -1) for name in ("scales", "zeros"))
    index = _groups_of(k, scheme.group_size)
    return GroupedWeight("codes", scheme.bits, weight["codes"], index, scales, offsets=-zeros * scales)


def _kquant(weight: QuantizedWeight, scheme: KQuantScheme) -> GroupedWeight:
    codes, index = weight["codes"], _groups_of(weight.shape[1], scheme.sub_block)
    per_super = 256 // scheme.sub_block
    # A half times an integer of at most 8 bits is exact in float32.
    scales = weight["d"].float().repeat_interleave(per_super, 1) * weight["sub_scales"].float()
    if scheme.zero is not None:
        zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        return GroupedWeight("codes", scheme.bits, codes, index, scales, zeros)
    mins = weight["dmin"].float().repeat_interleave(per_super, 1) * weight["sub_mins"].float()
    return GroupedWeight("codes", scheme.bits, codes, index, scales, offsets=-mins)


def _float8(weight: QuantizedWeight, scheme: FloatScheme) -> GroupedWeight:
    n, k = weight.shape
    scales, columns = weight["scales"].float(), None
    if scheme.block_shape is not None:
        rows, columns = scheme.block_shape
        scales = scales.repeat_interleave(rows, 0)[:n]
    else:
        scales = scales.reshape(-1, 1).expand(n, 1)
    codes = weight["codes"].view(torch.uint8)
    return GroupedWeight("fp8", 8, codes, _groups_of(k, columns), scales.contiguous())


def _lookup(weight: QuantizedWeight, scheme: LookupScheme) -> GroupedWeight:
    scales = scheme.block_scales(weight.tensors).reshape(weight.shape[0], -1)
    index, table = _groups_of(weight.shape[1], scheme.block_size), scheme.table_values()
    for parts in (1, 2):  # iq4_nl: integers; e2m1: halves of them; the integer kernels take both
        whole = table * parts
        if torch.equal(whole, whole.round()) and whole.max() - whole.min() <= 255:
            zero = int(-whole.min())
            codes = (whole.to(torch.int32) + zero).to(torch.uint8)[weight["codes"].int()]
            zeros = torch.full(scales.shape, zero, dtype=torch.uint8)
            return GroupedWeight("codes", 8, codes, index, scales / parts, zeros)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8)
    return GroupedWeight("codes", scheme.bits, weight["codes"], index, scales, zeros, table=table)
