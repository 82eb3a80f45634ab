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
)
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import IntegerScheme, Scheme


def solve(
    weights: Sequence[Tensor], statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
) -> list[Solution]:
    """Each weight [N, K] rounded on its own."""
    assert isinstance(scheme, IntegerScheme)
    return [_solve_one(weight, statistics, scheme, scale_dtype) for weight in weights]


def _solve_one(
    weight: Tensor, statistics: InputStatistics | None, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> Solution:
    if statistics is None:
        grid = min_max_grid(weight, scheme, scale_dtype)
    else:
        grid = search_grid(weight, statistics.mean_square, scheme, scale_dtype)
    codes = quantize(weight, grid, scheme)
    error = relative_error(weight, dequantize(codes, grid, scheme), statistics)
    details = {"rounding": "nearest", "range": "whole" if statistics is None else "searched"}
    return Solution(to_quantized_weight(codes, grid, scheme, scale_dtype), error, details)
