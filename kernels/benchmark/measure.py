"""One timing of one layer, its limits, and its error against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aphroquant.kernels.reference.grouped import TokenGroups
from aphroquant.kernels.reference.linear import input_scheme, quantize_dequantize
from aphroquant.schemes import DenseScheme, QuantizedWeight
from aphroquant.schemes.rows import split_rows

_PIECE = 1 << 24  # weights that are dequantized to float64 at once


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached on the simplest code: bytes read and floating-point operations, a second."""

    bytes_per_second: float
    operations_per_second: dict[str, float]  # by the dtype that products are of


@dataclass(frozen=True)
class Measurement:
    """A layer's time at a number of rows, beside its limits."""

    kernel: str
    layer: str
    out_features: int
    in_features: int
    rows: int
    microseconds: float
    num_bytes: int
    floor_microseconds: float
    error: float | None
    pairs: int | None = None  # of a token and an expert; None: each row is multiplied once

    @property
    def gigabytes_per_second(self) -> float:
        return self.num_bytes / self.microseconds / 1e3

    @property
    def teraflops(self) -> float:
        rows = self.rows if self.pairs is None else self.pairs
        return 2 * rows * self.out_features * self.in_features / self.microseconds / 1e6

    @property
    def share(self) -> float:
        """Of the limit: 1 is as fast as the machine's own ceiling."""
        return self.floor_microseconds / self.microseconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "layer": self.layer,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "m": self.rows,
            "us": round(self.microseconds, 3),
            "gb_per_s": round(self.gigabytes_per_second, 1),
            "tflops": round(self.teraflops, 2),
            "floor_us": round(self.floor_microseconds, 3),
            "share": round(self.share, 4),
            "error": self.error,
        }


def weight_bytes(weight: QuantizedWeight) -> int:
    """What a kernel has to read of it at least: codes at their width, everything else as it is stored."""
    return weight.num_bits // 8


def floor_microseconds(num_bytes: int, operations: int, product: str, ceilings: Ceilings) -> float:
    """The larger of the time to move the bytes and the time to compute."""
    return max(num_bytes / ceilings.bytes_per_second, operations / ceilings.operations_per_second[product]) * 1e6


def product_dtype(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    """What the fastest kernel could multiply: 8-bit numbers where inputs are quantized, else the inputs' dtype."""
    inputs = input_scheme(weight.scheme)
    if inputs is None:
        return str(dtype).removeprefix("torch.")
    return "float8" if inputs.kind == "float" else "int8"


def error_of(run: Callable[[Tensor], Tensor], weight: QuantizedWeight, x: Tensor) -> float:
    """||run(x) - y|| / ||y||, with y in float64 from the dequantized weight and the input as its scheme rounds it."""
    found = run(x).double()
    inputs = input_scheme(weight.scheme)
    rounded = x if inputs is None else quantize_dequantize(x.float(), inputs, weight.tensors.get("input_scale"))
    exact, missed, total, start = rounded.double(), 0.0, 0.0, 0
    for piece in split_rows(weight, _PIECE):
        stop = start + piece.shape[0]
        expected = exact @ _float64(piece).T
        missed += float((found[:, start:stop] - expected).square().sum())
        total += float(expected.square().sum())
        start = stop
    return float((missed / total) ** 0.5) if total else 0.0


def experts_error(
    found: Tensor, weights: Sequence[QuantizedWeight], x: Tensor, groups: TokenGroups, by_token: bool
) -> float:
    """As error_of, for the sorted results of several experts; x is that of tokens, or in the order of places."""
    ends, missed, total = groups.offsets.tolist(), 0.0, 0.0
    for expert, weight in enumerate(weights):
        places = slice(ends[expert], ends[expert + 1])
        rows = x[groups.rows[places].long()] if by_token else x[places]
        if not rows.shape[0]:
            continue
        inputs = input_scheme(weight.scheme)
        exact = rows if inputs is None else quantize_dequantize(rows.float(), inputs, weight.tensors.get("input_scale"))
        expected = exact.double() @ _float64(weight).T
        missed += float((found[places].double() - expected).square().sum())
        total += float(expected.square().sum())
    return float((missed / total) ** 0.5) if total else 0.0


def _float64(weight: QuantizedWeight) -> Tensor:
    return weight["weight"].double() if isinstance(weight.scheme, DenseScheme) else weight.dequantize(torch.float64)
