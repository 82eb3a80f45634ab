"""Round to nearest: every weight to the nearest point of its group's grid.

Without statistics the grid covers the whole range of the group. With them, ranges are searched for the least squared
error weighted by E[x**2]: a few large weights may be cut off if that makes the many finer where inputs are large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.grids import WeightGrid, plain_grids, searched_grids
from aphroquant.calibration.inputs import with_input_scale
from aphroquant.calibration.integer_grid import too_large
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.kernels.cpu import rounding
from aphroquant.numbers import is_finite
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme


def solve(
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    magnitude: Tensor | None = None,
) -> list[Solution]:
    """Each weight [N, K] rounded on its own, but that scales which engines want to be equal are shared.

    `magnitude` [] is that of all that share them, if the weights are only a part.
    """
    if isinstance(scheme, IntegerScheme) and statistics is None:
        return [_solve_one(weight, scheme, scale_dtype) for weight in weights]
    return solve_in_torch(weights, statistics, scheme, scale_dtype, magnitude)


def _solve_one(weight: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype) -> Solution:
    if rounding.usable(weight, scale_dtype) and is_finite(weight):
        return _solve_compiled(weight, scheme, scale_dtype)
    return solve_in_torch([weight], None, scheme, scale_dtype)[0]


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
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    magnitude: Tensor | None = None,
) -> list[Solution]:
    """What `solve` gives, on any device."""
    weights = [weight.float() for weight in weights]
    if statistics is None:
        return to_nearest(weights, plain_grids(weights, scheme, scale_dtype, magnitude), statistics, "whole")
    grids = searched_grids(weights, statistics.mean_square, scheme, scale_dtype, magnitude)
    return to_nearest(weights, grids, statistics, "searched")


def to_nearest(
    weights: Sequence[Tensor], grids: Sequence[WeightGrid], statistics: InputStatistics | None, searched: str
) -> list[Solution]:
    """Weights rounded to the nearest points of their grids."""
    solutions = []
    for weight, grid in zip(weights, grids, strict=True):
        codes = grid.nearest(weight)
        error = relative_error(weight, grid.decode(codes), statistics)
        quantized = with_input_scale(grid.quantized(codes), statistics)
        solutions.append(Solution(quantized, error, {"rounding": "nearest", "range": searched}))
    return solutions
