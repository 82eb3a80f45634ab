"""Round to nearest: every weight to the nearest point of its group's grid.

Without statistics the grid covers the whole range of the group. With them, ranges are searched for the least squared
error weighted by E[x**2]: a few large weights may be cut off if that makes the many finer where inputs are large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.integer_grid import (
    dequantize,
    min_max_grid,
    quantize,
    search_grid,
    to_quantized_weight,
    too_large,
)
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.kernels.cpu import rounding
from aphroquant.numbers import is_finite
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme


def solve(
    weights: Sequence[Tensor], statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
) -> list[Solution]:
    """Each weight [N, K] rounded on its own."""
    assert isinstance(scheme, IntegerScheme)
    return [_solve_one(weight, statistics, scheme, scale_dtype) for weight in weights]


def _solve_one(
    weight: Tensor, statistics: InputStatistics | None, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> Solution:
    if statistics is None and rounding.usable(weight, scale_dtype) and is_finite(weight):
        return _solve_compiled(weight, scheme, scale_dtype)
    return solve_in_torch(weight.float(), statistics, scheme, scale_dtype)


def _solve_compiled(weight: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype) -> Solution:
    size = scheme.group_size or weight.shape[1]
    found = rounding.round_integers(weight, scheme.bits, size, scale_dtype, symmetric=scheme.symmetric)
    if found is None:
        raise too_large(scale_dtype)
    tensors = {"codes": found.codes, "scales": found.scales}
    if found.zeros is not None:
        tensors["zeros"] = found.zeros
    rounded = QuantizedWeight(scheme, tensors, (weight.shape[0], weight.shape[1]))
    error = found.error / found.total if found.total > 0 else 0.0
    return Solution(rounded, error, {"rounding": "nearest", "range": "whole"}, square_sum=found.total)


def solve_in_torch(
    weight: Tensor, statistics: InputStatistics | None, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> Solution:
    """What `solve` gives for one weight, on any device."""
    if statistics is None:
        grid = min_max_grid(weight, scheme, scale_dtype)
    else:
        grid = search_grid(weight, statistics.mean_square, scheme, scale_dtype)
    codes = quantize(weight, grid, scheme)
    error = relative_error(weight, dequantize(codes, grid, scheme), statistics)
    details = {"rounding": "nearest", "range": "whole" if statistics is None else "searched"}
    return Solution(to_quantized_weight(codes, grid, scheme, scale_dtype), error, details)
