"""GGUF super-blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aphroquant.schemes.base import BaseScheme


@dataclass(frozen=True)
class KQuantScheme(BaseScheme):
    """GGUF super-blocks of 256: W = d * sub_scales * codes - dmin * sub_mins.

    Tensors: codes uint8 [N, K] (for q6_k the stored value, 32 = zero); d float16 [N, K/256];
    q4_k: sub_scales, sub_mins uint8 [N, K/32], dmin float16 [N, K/256]; q6_k: sub_scales int8 [N, K/16].
    """

    kind: Literal["q4_k", "q6_k"]

    @property
    def bits(self) -> int:
        return 4 if self.kind == "q4_k" else 6

    def __str__(self) -> str:
        return self.kind.upper()

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        codes, supers = (out_features, in_features), (out_features, in_features // 256)
        if self.kind == "q6_k":
            return {"codes": codes, "d": supers, "sub_scales": (out_features, in_features // 16)}
        subs = (out_features, in_features // 32)
        return {"codes": codes, "d": supers, "dmin": supers, "sub_scales": subs, "sub_mins": subs}

    def storage_bits(self, name: str) -> int | None:
        if name == "codes":
            return self.bits
        return 6 if self.kind == "q4_k" and name.startswith("sub_") else None

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        sub_block = 32 if self.kind == "q4_k" else 16
        per_super = 256 // sub_block
        scales = tensors["d"].to(work).repeat_interleave(per_super, 1) * tensors["sub_scales"].to(work)
        codes = tensors["codes"].to(work).reshape(shape[0], -1, sub_block)
        if self.kind == "q6_k":
            return ((codes - 32) * scales[..., None]).reshape(shape)
        mins = tensors["dmin"].to(work).repeat_interleave(per_super, 1) * tensors["sub_mins"].to(work)
        return (codes * scales[..., None] - mins[..., None]).reshape(shape)
