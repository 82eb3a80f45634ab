"""FP8 codes with scales per tensor, channel or block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes.activation import ActivationScheme
from aphroquant.schemes.base import BaseScheme

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class FloatScheme(BaseScheme):
    """W = codes * scales with FP8 codes.

    Tensors: codes float8_e4m3fn [N, K]; scales float [] | [N, 1] | [ceil(N/r), ceil(K/c)] for granularity tensor |
    channel | block (`block_shape` = (r, c)); input_scale float32 [] with static activations. Without `activations`
    the layer is weight-only.
    """

    granularity: Granularity
    block_shape: tuple[int, int] | None = None
    activations: ActivationScheme | None = None
    dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if (self.granularity == "block") != (self.block_shape is not None):
            raise UsageError(f"granularity {self.granularity!r} and block_shape {self.block_shape} contradict")

    def __str__(self) -> str:
        where = f"block {self.block_shape[0]}x{self.block_shape[1]}" if self.block_shape else f"per {self.granularity}"
        if self.activations is None:
            return f"fp8 {where}"
        return f"fp8 {where} x fp8 {'dynamic' if self.activations.dynamic else 'static'} inputs"

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        codes = (out_features, in_features)
        if self.block_shape is not None:
            rows, columns = self.block_shape
            return {"codes": codes, "scales": (math.ceil(out_features / rows), math.ceil(in_features / columns))}
        return {"codes": codes, "scales": () if self.granularity == "tensor" else (out_features, 1)}

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        scales = tensors["scales"].to(work)
        if self.block_shape is not None:
            rows, columns = self.block_shape
            scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            scales = scales[: shape[0], : shape[1]]  # edge blocks are partial
        return tensors["codes"].to(work) * scales
