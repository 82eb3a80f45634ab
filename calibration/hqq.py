"""HQQ: zero points for the least sum of |error|**p with p below one, found from the weights alone.

Such a sum is content with a few large errors if the many others are small, as heavy-tailed weights want it. It is made
small by turns (half-quadratic splitting): with the codes at hand, errors are split into a sparse part, which a soft
threshold keeps of the large ones, and a rest; the zero point that makes the rest's mean zero is the next one. The
threshold falls from round to round. Everything is in units of a step, so that a weight's size does not matter.

Beyond the published method, smaller ranges are tried for each group, and the state of the least squared error is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.integer_grid import (
    IntegerGrid,
    join_groups,
    smallest_share,
    split_groups,
    stored_scales,
    to_quantized_weight,
)
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import AffineScheme, IntegerScheme, QuantizedWeight, Scheme

_NORM = 0.7  # p
_BETA, _GROWTH, _ROUNDS = 10.0, 1.01, 6  # the published threshold, where a step is the unit; more rounds change nothing
_NUM_SHARES = 8
_FEW_BITS = 3
_CHUNK_ELEMENTS = 1 << 17
_GPU_CHUNK_ELEMENTS = 1 << 25


class _Groups(NamedTuple):
    """Groups' scales and zero points [n, G], and the squared error of each."""

    scales: Tensor
    zeros: Tensor
    error: Tensor


def solve(
    weights: Sequence[Tensor], statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
) -> list[Solution]:
    """Each weight [N, K] on its own; statistics only say what the error is."""
    assert isinstance(scheme, AffineScheme | IntegerScheme)
    return [_solve_one(weight.float(), statistics, scheme, scale_dtype) for weight in weights]


def _solve_one(
    weight: Tensor, statistics: InputStatistics | None, scheme: AffineScheme | IntegerScheme, scale_dtype: torch.dtype
) -> Solution:
    grouping = IntegerScheme(scheme.bits, scheme.group_size, False)
    whole = isinstance(scheme, IntegerScheme)
    groups = split_groups(weight, grouping)  # [N, G, g]
    scales, zeros = torch.empty(2, *groups.shape[:2], device=weight.device)
    elements = _CHUNK_ELEMENTS if weight.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    rows = max(1, elements // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        found = _optimized(groups[part], scheme.bits, scale_dtype, whole=whole)
        scales[part], zeros[part] = found.scales, found.zeros
    codes = join_groups(_codes(groups, scales, zeros, 2**scheme.bits - 1).to(torch.uint8), weight.shape[1])
    quantized = _quantized(codes, IntegerGrid(scales, zeros), scheme, scale_dtype)
    error = relative_error(weight, quantized.dequantize(), statistics)
    return Solution(quantized, error, {"rounding": "nearest", "range": "half-quadratic"})


def _quantized(
    codes: Tensor, grid: IntegerGrid, scheme: AffineScheme | IntegerScheme, scale_dtype: torch.dtype
) -> QuantizedWeight:
    if isinstance(scheme, IntegerScheme):
        return to_quantized_weight(codes, grid, scheme, scale_dtype)
    tensors = {
        "codes": codes,
        "scales": grid.scales.to(scale_dtype).flatten(),
        "zeros": grid.zeros.to(scale_dtype).flatten(),
    }
    return QuantizedWeight(scheme, tensors, (codes.shape[0], codes.shape[1]))


def _optimized(groups: Tensor, bits: int, scale_dtype: torch.dtype, *, whole: bool) -> _Groups:
    """The best scales and zero points of groups [n, G, g], as they are stored; `whole`: zero points are codes."""
    levels, low, high = 2**bits - 1, groups.amin(-1), groups.amax(-1)
    if whole:
        low, high = low.clamp(max=0), high.clamp(min=0)
    best: _Groups | None = None
    shares = torch.linspace(1.0, smallest_share(bits), _NUM_SHARES).tolist() if bits <= _FEW_BITS else [1.0]
    for share in shares:
        scales = stored_scales((high - low) * share / levels, scale_dtype)
        zeros = levels / 2 - (high + low) / 2 / scales
        for found in _rounds(groups, scales, zeros, levels, scale_dtype, whole=whole):
            best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _rounds(
    groups: Tensor, scales: Tensor, zeros: Tensor, levels: int, scale_dtype: torch.dtype, *, whole: bool
) -> Iterator[_Groups]:
    """What each round finds, the start first."""
    relative, beta = groups / scales[..., None], _BETA
    for _ in range(_ROUNDS):
        stored = zeros.round().clamp(0, levels) if whole else zeros.to(scale_dtype).float()
        yield _Groups(scales, stored, _error(groups, scales, stored, levels))
        codes = _codes(groups, scales, zeros, levels)
        rest = relative - (codes - zeros[..., None])
        sparse = _shrunken(rest, beta)
        zeros = (codes - (relative - sparse)).mean(-1)
        beta *= _GROWTH


def _shrunken(errors: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: what of each error is taken for sparse."""
    sizes = errors.abs()
    return errors.sign() * (sizes - sizes.clamp(min=1e-8) ** (_NORM - 1) / beta).clamp_(min=0)


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    codes = _codes(groups, scales, zeros, levels)
    return ((codes - zeros[..., None]) * scales[..., None]).sub_(groups).square_().sum(-1)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    return (groups / scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, levels)


def _better(first: _Groups, second: _Groups) -> _Groups:
    takes = second.error < first.error
    return _Groups(*(torch.where(takes, new, old) for old, new in zip(first, second, strict=True)))
