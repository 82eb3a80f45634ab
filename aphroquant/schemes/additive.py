"""Sums of codebook vectors: AQLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes.base import BaseScheme

MAX_CODE_BITS = 31  # codes are at most int32


@dataclass(frozen=True)
class AdditiveScheme(BaseScheme):
    """W[i*out_group + a, j*in_group + c] = scales[i] * sum over m of codebooks[m, codes[i, j, m], a, c].

    Tensors:
        codes     uint8 (code_bits <= 8) or int32 [N/out_group, K/in_group, M], 0 .. 2**code_bits - 1
        codebooks float [M, 2**code_bits, out_group, in_group]
        scales    float [N/out_group]
    """

    num_codebooks: int
    code_bits: int
    out_group: int = 1
    in_group: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.code_bits <= MAX_CODE_BITS:
            raise UsageError(f"code_bits = {self.code_bits} must be between 1 and {MAX_CODE_BITS}")
        for name in ("num_codebooks", "out_group", "in_group"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} must be positive")

    def __str__(self) -> str:
        group = f"{self.out_group}x{self.in_group}" if self.out_group > 1 else f"{self.in_group}"
        return f"additive {self.num_codebooks}x{self.code_bits} g{group}"

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        if out_features % self.out_group or in_features % self.in_group:
            raise InputError(
                f"{[out_features, in_features]} is no multiple of {self}'s {[self.out_group, self.in_group]}"
            )
        out_groups = out_features // self.out_group
        return {
            "codes": (out_groups, in_features // self.in_group, self.num_codebooks),
            "codebooks": (self.num_codebooks, 2**self.code_bits, self.out_group, self.in_group),
            "scales": (out_groups,),
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"codes": torch.uint8 if self.code_bits <= 8 else torch.int32}

    def storage_bits(self, name: str) -> int | None:
        return self.code_bits if name == "codes" else None

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        codes, codebooks = tensors["codes"], tensors["codebooks"]
        total = codebooks[0].to(work)[codes[..., 0].int()]  # [N/out_group, K/in_group, out_group, in_group]
        for book in range(1, self.num_codebooks):
            total += codebooks[book].to(work)[codes[..., book].int()]
        scaled = total * tensors["scales"].to(work)[:, None, None, None]
        return scaled.transpose(1, 2).reshape(shape)
