"""Grids of integers for short blocks: the scale, or scale and minimum, of the least weighted squared error.

Rounding to the largest element wastes levels: a block's error is mostly that of its many small elements. So several
grids are tried that put the extremes a little inside or outside their outermost levels; each gives codes, and for given
codes the best scale (and minimum) is a least-squares solution whose error follows from a few sums.

Throughout, x is [B, n] and `weights` the positive factors [B, n] of the squared errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many levels beyond the outermost one the extremes are put. Tuned on numbers of normal, uniform and Student's
# distribution; coarser grids than the range needs (below zero) pay only where there are many levels.
_ONE_EXTREME = (-3.2, -2.7, -2.2, -1.7, -1.2, -0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6, 2.0)
_TWO_EXTREMES = (-0.2, 0.2, 0.6, 1.0)
_EQUAL_CODES = 1e-6  # relative variance of codes below which it is rounding error


def fit_symmetric(x: Tensor, weights: Tensor, low: int, high: int) -> Tensor:
    """The scale [B] for x = scale * code, codes low .. high with |low| > high: negative where that uses `low`."""
    extreme = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    per_level = torch.where(extreme == 0, 0.0, -1 / extreme)
    weighted = x * weights
    best, scale = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])
    for beyond in (levels for levels in _ONE_EXTREME if 3 * levels >= low):
        codes = (x * (per_level * (beyond - low))).round_().clamp_(low, high)
        product = (weighted * codes).sum(dim=-1)
        square = codes.square_().mul_(weights).sum(dim=-1)
        gain = product * product / square  # how much of the sum of squares this grid explains
        better = gain > best  # false for 0 / 0
        best = torch.where(better, gain, best)
        scale = torch.where(better, product / square, scale)
    return scale


def fit_affine(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale >= 0 and minimum <= 0, [B] each, for x = scale * code + minimum, codes 0 .. levels."""
    search = _AffineSearch(x, weights)
    low = x.amin(dim=-1, keepdim=True).clamp_(max=0)
    width = (x.amax(dim=-1, keepdim=True) - low).clamp_(min=0)
    search.limit = 2 / levels * width.squeeze(-1)
    shifted = x - low
    for below in _TWO_EXTREMES:
        for above in _TWO_EXTREMES:
            step = torch.where(width == 0, 0.0, (levels + below + above) / width)
            search.try_codes((shifted * step).sub_(below).round_().clamp_(0, levels))
    search.try_codes(affine_codes(x, search.scale[:, None], search.minimum[:, None], levels))
    return search.scale, search.minimum


def affine_codes(x: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    """The nearest codes 0 .. levels for x = scale * code + minimum; 0 where the scale is zero."""
    return torch.where(scale == 0, 0.0, (x - minimum) / scale).round_().clamp_(0, levels)


def symmetric_codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The nearest codes low .. high for x = scale * code; 0 where the scale is zero."""
    return torch.where(scale == 0, 0.0, x / scale).round_().clamp_(low, high)


class _AffineSearch:
    """The best scale and minimum so far."""

    limit: Tensor  # scales beyond are artefacts of weights that leave one element only

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self._weights = weights
        self._weighted = x * weights
        self._sum_w = weights.sum(dim=-1)
        self._sum_x = self._weighted.sum(dim=-1)
        self._sum_xx = (self._weighted * x).sum(dim=-1)
        self.scale = x.new_zeros(x.shape[0])
        self.minimum = (self._sum_x / self._sum_w).clamp_(max=0)  # the best without codes
        self._error = self._sum_xx - self.minimum * (2 * self._sum_x - self.minimum * self._sum_w)

    def try_codes(self, codes: Tensor) -> None:
        """Solve for these codes, and keep the solution if it is the best."""
        sum_xq = (self._weighted * codes).sum(dim=-1)
        weighted_codes = codes * self._weights
        sum_q, sum_qq = weighted_codes.sum(dim=-1), weighted_codes.mul_(codes).sum(dim=-1)
        determinant = self._sum_w * sum_qq - sum_q * sum_q
        minimum = (sum_qq * self._sum_x - sum_q * sum_xq) / determinant
        # A positive minimum cannot be stored; equal codes tell none.
        without = ~(minimum <= 0) | (determinant <= _EQUAL_CODES * self._sum_w * sum_qq)
        minimum = torch.where(without, 0.0, minimum)
        scale = torch.where(without, sum_xq / sum_qq, (self._sum_w * sum_xq - self._sum_x * sum_q) / determinant)
        error = self._sum_xx + scale * (scale * sum_qq - 2 * sum_xq)
        error += minimum * (minimum * self._sum_w - 2 * self._sum_x + 2 * scale * sum_q)
        better = (error < self._error) & (scale >= 0) & (scale <= self.limit)
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, minimum, self.minimum)
