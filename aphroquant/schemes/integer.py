"""Integer codes with scales and zero points per group: GPTQ, AWQ, compressed-tensors, GGUF's simple blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes.activation import ActivationScheme
from aphroquant.schemes.base import BaseScheme


@dataclass(frozen=True)
class IntegerScheme(BaseScheme):
    """W = (codes - zeros) * scales, or codes * scales + offsets, per group of `group_size` input columns.

    Tensors of the weight:
        codes   uint8 [N, K], 0 .. 2**bits - 1
        scales  float [N, G], G = ceil(K / group_size), or 1 when `group_size` is None (one group a row)
        zeros   uint8 [N, G], absent when `symmetric` (the zero point is then 2**(bits - 1))
        offsets float [N, G], instead of zeros when `has_offsets` (GGUF Q4_1: a real-valued minimum)
        group_index int32 [K], only when `act_order`: the group of input column k (default k // group_size)
        input_scale float32 [], only with static activations
    Scales may be negative (the full-range symmetric grid).
    """

    bits: int
    group_size: int | None
    symmetric: bool
    has_offsets: bool = False
    act_order: bool = False
    activations: ActivationScheme | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits = {self.bits} must be between 1 and 8")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size = {self.group_size} must be positive, or None for one group a row")
        if self.symmetric and self.has_offsets:
            raise UsageError("a symmetric integer scheme has no offsets")

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else math.ceil(in_features / self.group_size)

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        order = " act-order" if self.act_order else ""
        inputs = f" x {self.activations.kind}{self.activations.bits} inputs" if self.activations else ""
        return f"int{self.bits} {kind} {group}{order}{inputs}"

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        grouped = (out_features, self.num_groups(in_features))
        shapes: dict[str, tuple[int, ...]] = {"codes": (out_features, in_features), "scales": grouped}
        if self.has_offsets:
            shapes["offsets"] = grouped
        elif not self.symmetric:
            shapes["zeros"] = grouped
        if self.act_order:
            shapes["group_index"] = (in_features,)
        return shapes

    def storage_bits(self, name: str) -> int | None:
        return self.bits if name in ("codes", "zeros") else None

    def group_index(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
        """The group of every input column, int64 [K]."""
        if "group_index" in tensors:
            return tensors["group_index"].long()
        return torch.arange(in_features, device=tensors["codes"].device) // (self.group_size or in_features)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        size = self.group_size or shape[1]
        if self.act_order or not size or shape[1] % size:
            index = self.group_index(tensors, shape[1])
            return self._apply(tensors["codes"].to(work), lambda name: tensors[name].to(work)[:, index])
        codes = tensors["codes"].to(work).reshape(shape[0], shape[1] // size, size)  # [N, G, group size]
        return self._apply(codes, lambda name: tensors[name].to(work)[..., None]).view(shape)

    def _apply(self, codes: Tensor, spread: Callable[[str], Tensor]) -> Tensor:
        """The formula, with `spread` giving a tensor of the groups in a shape that fits the codes."""
        if self.has_offsets:
            return codes * spread("scales") + spread("offsets")
        zeros = 2 ** (self.bits - 1) if self.symmetric else spread("zeros")
        return (codes - zeros) * spread("scales")
