"""Integer codes with real-valued zero points, in groups of the flattened weight: HQQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes.base import BaseScheme


@dataclass(frozen=True)
class AffineScheme(BaseScheme):
    """W = (codes - zeros) * scales, with real zero points and groups that may cross rows.

    The weight, flattened, is seen as a matrix [C, group_size] (`axis` 1: a group is one of its rows, so that element f
    belongs to group f // group_size) or [group_size, C] (`axis` 0: a group is a column, f belongs to group f % C),
    C = N * K / group_size. `group_size` None stands for K, one group a row (axis 0: for N, one group a column).

    Tensors: codes uint8 [N, K], 0 .. 2**bits - 1; scales, zeros float [C].

    A scheme apart from IntegerScheme: codes * scales + offsets would round differently, and zero points that are no
    codes would have to be refused wherever integer ones are packed.
    """

    bits: int
    group_size: int | None
    axis: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits = {self.bits} must be between 1 and 8")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size = {self.group_size} must be positive, or None for one group a row")
        if self.axis not in (0, 1):
            raise UsageError(f"axis = {self.axis} must be 0 or 1")

    def __str__(self) -> str:
        whole = "row" if self.axis == 1 else "column"
        group = whole if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} real zeros {group}{' axis 0' if self.axis == 0 else ''}"

    def num_groups(self, out_features: int, in_features: int) -> int:
        if self.group_size is None:
            return out_features if self.axis == 1 else in_features
        return out_features * in_features // self.group_size

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        if out_features * in_features % (self.group_size or 1):
            raise InputError(f"{[out_features, in_features]} is no whole number of groups of {self.group_size}")
        groups = (self.num_groups(out_features, in_features),)
        return {"codes": (out_features, in_features), "scales": groups, "zeros": groups}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"codes": torch.uint8}

    def storage_bits(self, name: str) -> int | None:
        return self.bits if name == "codes" else None

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        groups = self.num_groups(*shape)
        grouped = (groups, -1) if self.axis == 1 else (-1, groups)
        per_group = (-1, 1) if self.axis == 1 else (1, -1)
        zeros, scales = (tensors[name].to(work).reshape(per_group) for name in ("zeros", "scales"))
        return ((tensors["codes"].to(work).reshape(grouped) - zeros) * scales).reshape(shape)
