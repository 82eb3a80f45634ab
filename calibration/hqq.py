"""HQQ: zero points for the least sum of |error|**p with p below one, found from the weights alone.

Such a sum is content with a few large errors if the many others are small, as heavy-tailed weights want it. It is made
small by turns (half-quadratic splitting): with the codes at hand, errors are split into a sparse part, which a soft
threshold keeps of the large ones, and a rest; the zero point that makes the rest's mean zero is the next one. The
threshold falls from round to round. Everything is in units of a step, so that a weight's size does not matter.

Of all states, those with whole zero points among them, the one with the least squared error relative to
w**2 + 0.02 E[w**2] is kept. Small weights often stand where inputs are large, since a norm's gain made them so, and a
real zero point moves all of them by the same amount. Mean KL divergence of SmolLM2-135M with its norms folded in, of
4 bits in groups of 64, on 4 x 1024 tokens of Wikipedia (standard errors 0.02 to 0.04), without data: whole zero points
and ranges 0.513, ranges searched 0.522; real zero points of the least squared error 0.767, and 0.663 with smaller
ranges as well; as it is 0.498. With two and three bits smaller ranges are tried.
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
_FLOOR = 0.02  # of a group's mean square: what even a weight of zero counts as
_CHUNK_ELEMENTS = 1 << 17
_GPU_CHUNK_ELEMENTS = 1 << 25


class _Groups(NamedTuple):
    """Groups' scales and zero points [n, G], and the relative squared error of each."""

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
    ranges = [(low.clamp(max=0), high.clamp(min=0), True)] + ([] if whole else [(low, high, False)])
    shares = torch.linspace(1.0, smallest_share(bits), _NUM_SHARES).tolist() if bits <= _FEW_BITS else [1.0]
    best: _Groups | None = None
    for least, greatest, rounds_zeros in ranges:
        for share in shares:
            scales = stored_scales((greatest - least) * share / levels, scale_dtype)
            zeros = levels / 2 - (greatest + least) / 2 / scales
            for found in _rounds(groups, scales, zeros, levels, scale_dtype, whole=rounds_zeros):
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
    """Squares, those of small weights counting more."""
    codes, squares = _codes(groups, scales, zeros, levels), groups.square()
    weights = 1 / (squares + _FLOOR * squares.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
    return ((codes - zeros[..., None]) * scales[..., None]).sub_(groups).square_().mul_(weights).sum(-1)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    return (groups / scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, levels)


def _better(first: _Groups, second: _Groups) -> _Groups:
    takes = second.error < first.error
    return _Groups(*(torch.where(takes, new, old) for old, new in zip(first, second, strict=True)))
