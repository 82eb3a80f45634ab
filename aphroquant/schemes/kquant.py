"""GGUF super-blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.schemes.base import BaseScheme

SUPER_BLOCK = 256

KQuantKind = Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


class _Layout(NamedTuple):
    bits: int
    sub_block: int
    scale_bits: int  # of sub_scales and sub_mins
    zero: int | None  # the code that stands for zero; None: there are minima instead


_LAYOUTS: Mapping[KQuantKind, _Layout] = {
    "q2_k": _Layout(2, 16, 4, None),
    "q3_k": _Layout(3, 16, 6, 4),
    "q4_k": _Layout(4, 32, 6, None),
    "q5_k": _Layout(5, 32, 6, None),
    "q6_k": _Layout(6, 16, 8, 32),
}


@dataclass(frozen=True)
class KQuantScheme(BaseScheme):
    """GGUF super-blocks of 256 columns, in sub-blocks of `sub_block`.

    q2_k, q4_k, q5_k: W = d * sub_scales * codes - dmin * sub_mins; q3_k, q6_k: W = d * sub_scales * (codes - zero).

    Tensors: codes uint8 [N, K]; d float16 [N, K/256]; sub_scales [N, K/sub_block], int8 where there is a `zero`, else
    uint8 and with them sub_mins uint8 of that shape and dmin float16 [N, K/256].
    """

    kind: KQuantKind

    @property
    def bits(self) -> int:
        return _LAYOUTS[self.kind].bits

    @property
    def sub_block(self) -> int:
        return _LAYOUTS[self.kind].sub_block

    @property
    def scale_bits(self) -> int:
        """Bits of each sub-scale and each sub-minimum."""
        return _LAYOUTS[self.kind].scale_bits

    @property
    def zero(self) -> int | None:
        """The code that stands for zero; None if the blocks have minima."""
        return _LAYOUTS[self.kind].zero

    def __str__(self) -> str:
        return self.kind.upper()

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        if in_features % SUPER_BLOCK:
            raise InputError(f"in_features = {in_features} is no multiple of {self}'s {SUPER_BLOCK}")
        codes, supers = (out_features, in_features), (out_features, in_features // SUPER_BLOCK)
        subs = (out_features, in_features // self.sub_block)
        if self.zero is not None:
            return {"codes": codes, "d": supers, "sub_scales": subs}
        return {"codes": codes, "d": supers, "dmin": supers, "sub_scales": subs, "sub_mins": subs}

    def dtypes(self) -> dict[str, torch.dtype]:
        if self.zero is not None:
            return {"codes": torch.uint8, "sub_scales": torch.int8}
        return {"codes": torch.uint8, "sub_scales": torch.uint8, "sub_mins": torch.uint8}

    def storage_bits(self, name: str) -> int | None:
        if name == "codes":
            return self.bits
        return self.scale_bits if name.startswith("sub_") else None

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        per_super = SUPER_BLOCK // self.sub_block
        scales = tensors["d"].to(work).repeat_interleave(per_super, 1) * tensors["sub_scales"].to(work)
        codes = tensors["codes"].to(work).reshape(shape[0], -1, self.sub_block)
        if self.zero is not None:
            return ((codes - self.zero) * scales[..., None]).reshape(shape)
        mins = tensors["dmin"].to(work).repeat_interleave(per_super, 1) * tensors["sub_mins"].to(work)
        return (codes * scales[..., None] - mins[..., None]).reshape(shape)
