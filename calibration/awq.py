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
Loss = Callable[[Sequence[Tensor]], float]  # the weights in place of the originals -> error of the parent's output


class ChannelScales(NamedTuple):
    """`scales` float32 [K], the loss with them and without any, and their ratio r (None if no scaling is best)."""

    scales: Tensor
    loss: float
    unscaled_loss: float
    ratio: float | None


def search_scales(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    loss: Loss,
    roundings: Sequence[Rounding],
    *,
    group_size: int | None,
    tie: Callable[[Tensor], Tensor] = lambda channels: channels,
) -> ChannelScales:
    """The best scales for the input channels of `weights` (each [N, K]) of all candidates, "none" among them.

    `roundings` has one for each weight; `group_size` is that of the first, by which channels are compared.
    `tie` maps statistics [K] to statistics that are equal where scales have to be (channels shared by query heads).
    """
    activations = tie(mean_abs).clamp(min=_SMALLEST)
    magnitudes = tie(weight_magnitudes(weights, group_size))
    ones = torch.ones_like(activations)
    unscaled = loss([rounding(weight) for weight, rounding in zip(weights, roundings, strict=True)])
    best = ChannelScales(ones, unscaled, unscaled, None)

    def tried(best: ChannelScales, ratio: float) -> ChannelScales:
        scales = _candidate(activations, magnitudes, ratio)
        scaled = zip(weights, roundings, strict=True)
        error = loss([rounding(weight * scales) / scales for weight, rounding in scaled])
        return ChannelScales(scales, error, unscaled, ratio) if error < best.loss else best

    best = reduce(tried, COARSE_RATIOS, best)
    if best.ratio is not None:
        best = reduce(tried, (max(best.ratio - FINE_STEP, 0.0), best.ratio + FINE_STEP), best)
    return best


def weight_magnitudes(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group, [K]."""
    stacked = torch.cat([weight.abs() for weight in weights])
    width = stacked.shape[1]
    size = group_size or width
    padded = torch.nn.functional.pad(stacked, (0, -width % size)).reshape(stacked.shape[0], -1, size)
    relative = padded / padded.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return relative.reshape(stacked.shape[0], -1)[:, :width].mean(0)


def _candidate(activations: Tensor, magnitudes: Tensor, ratio: float) -> Tensor:
    scales = activations**ratio / (magnitudes ** (1 - ratio) + _SMALLEST)
    scales = scales.clamp(min=_SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()
