"""AWQ: move magnitude between an input channel and its weights before rounding, where activations say that it pays.

For linears that share an input x, W diag(s) and x / s give the same product; 1 / s is folded into whatever makes x: the
gain of the norm before them, or the rows of the linear before them. Channels with large activations get a large s, so
that their weights are rounded relatively finer. Candidates are s = a^r / w^(1 - r), with a = E|x| and w = the mean size
of a channel's weights relative to their groups ("duo scaling"); the one that changes the parent's output least wins.
Candidates without w were tried as well: not one of them won in any layer of SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

COARSE_RATIOS = tuple(step / 10 for step in range(10))
FINE_STEP = 0.05  # to both sides of the best coarse one: the usual grid of 20 ratios at 12 evaluations
_SMALLEST = 1e-4

Rounding = Callable[[Tensor], Tensor]  # weight [N, K] -> the values that it is rounded to
# The weights in place of the originals, the scales that inputs are divided by -> error of the parent's output.
Loss = Callable[[Sequence[Tensor], Tensor], float]
Tie = Callable[[Tensor], Tensor]
Candidate = Callable[[float], Tensor]  # a ratio from 0 to 1 -> scales [K]


class ChannelScales(NamedTuple):
    """`scales` float32 [K], the loss with them and without any, and their ratio r (None if no scaling is best)."""

    scales: Tensor
    loss: float
    unscaled_loss: float
    ratio: float | None


def search_scales(
    weights: Sequence[Tensor], candidate: Candidate, loss: Loss, roundings: Sequence[Rounding]
) -> ChannelScales:
    """The best scales for the input channels of `weights` (each [N, K]) of all candidates, "none" among them.

    `roundings` has one for each weight.
    """
    ones = torch.ones_like(weights[0][0])
    unscaled = loss([rounding(weight) for weight, rounding in zip(weights, roundings, strict=True)], ones)
    best = ChannelScales(ones, unscaled, unscaled, None)

    def tried(best: ChannelScales, ratio: float) -> ChannelScales:
        scales = candidate(ratio)
        scaled = zip(weights, roundings, strict=True)
        error = loss([rounding(weight * scales) / scales for weight, rounding in scaled], scales)
        return ChannelScales(scales, error, unscaled, ratio) if error < best.loss else best

    best = reduce(tried, COARSE_RATIOS, best)
    if best.ratio is not None:
        best = reduce(tried, (max(best.ratio - FINE_STEP, 0.0), best.ratio + FINE_STEP), best)
    return best


def candidates(
    weights: Sequence[Tensor], mean_abs: Tensor, *, group_size: int | None, tie: Tie = lambda channels: channels
) -> Candidate:
    """AWQ's. `tie` maps statistics [K] to statistics that are equal where scales have to be (channels shared by query
    heads); `group_size` is that by which channels are compared."""
    activations = tie(mean_abs).clamp(min=_SMALLEST)
    magnitudes = tie(weight_magnitudes(weights, group_size))
    return lambda ratio: balanced(activations**ratio / (magnitudes ** (1 - ratio) + _SMALLEST))


def balanced(scales: Tensor) -> Tensor:
    """The scales with the smallest and the largest as far below and above one."""
    scales = scales.clamp(min=_SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def weight_magnitudes(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group, [K]."""
    stacked = torch.cat([weight.abs() for weight in weights])
    width = stacked.shape[1]
    size = group_size or width
    padded = torch.nn.functional.pad(stacked, (0, -width % size)).reshape(stacked.shape[0], -1, size)
    relative = padded / padded.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return relative.reshape(stacked.shape[0], -1)[:, :width].mean(0)
