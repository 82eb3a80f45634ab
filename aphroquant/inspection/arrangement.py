"""Whether zero points and scales belong to the codes that they are applied to.

A file can be read without complaint and still be wrong: zero points stored one less than the label says, or nibbles in
another order than the format's. Three properties of trained weights, which any quantizer keeps, tell it:

- Weights are centred: in units of codes, the mean of a group's codes is its zero point, over all groups on average.
- A group's zero point follows its codes: over the groups both vary together.
- Weights of a matrix have about one spread: where a group's codes spread little, an outlier has made its scale large.
  So log scale and log spread vary against each other, as long as each scale is that of its own codes.

The second and the third are computed for the orders in which AWQ files have been packed by mistake, too: if another one
fits, the file says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.formats.packing import AWQ_ORDER, AWQ_PACK

_SMALLEST_SPREAD = 0.3  # in codes: less is rounding, and says nothing
_ORDERS = {
    "": None,
    "interleaved": list(AWQ_ORDER),
    "sequential": [AWQ_ORDER.index(column) for column in range(AWQ_PACK)],
}


class Fit(NamedTuple):
    """How well an order fits: correlation of zero points and mean codes, and of scales and spreads (negated)."""

    zeros: float
    scales: float


@dataclass
class Arrangement:
    """Sums over groups, of one matrix or of many."""

    groups: int = 0
    shift: float = 0.0  # summed: mean code less zero point
    squared_shift: float = 0.0
    zeros_vary: bool = False
    _moments: dict[str, Tensor] = field(default_factory=dict)  # order -> [2, 6]: n, x, y, xx, yy, xy of both relations

    def add(self, codes: Tensor, zeros: Tensor, scales: Tensor, *, has_zeros: bool) -> None:
        """codes [N, G, size]; zeros and scales [N, G]."""
        rows = codes.shape[0]
        wide = codes.float()
        means, spreads = wide.mean(-1), wide.std(-1, unbiased=False).clamp_min(_SMALLEST_SPREAD).log()
        usable = (scales != 0) & scales.isfinite()
        logs = torch.where(usable, scales.abs(), 1.0).log()
        self.groups += means.numel()
        shifts = (means - zeros).double()
        self.shift += float(shifts.sum())
        self.squared_shift += float(shifts.square().sum())
        self.zeros_vary |= has_zeros and bool((zeros != zeros.flatten()[0]).any())
        for name, order in _ORDERS.items():
            if order is not None and rows % AWQ_PACK:
                continue
            moments = torch.stack(
                [_moments(means, _reordered(zeros, order)), _moments(spreads, _reordered(logs, order))]
            )
            self._moments[name] = self._moments.get(name, 0) + moments

    def merge(self, other: Arrangement) -> None:
        """Take in another matrix, around its own means: what differs between matrices is no relation."""
        self.groups += other.groups
        self.shift += other.shift
        self.squared_shift += other.squared_shift
        self.zeros_vary |= other.zeros_vary
        for name, moments in other._moments.items():
            self._moments[name] = self._moments.get(name, 0) + _centred(moments)

    @property
    def mean_shift(self) -> float:
        """How far, in codes, the mean weight lies above its zero point."""
        return self.shift / self.groups if self.groups else 0.0

    @property
    def shift_error(self) -> float:
        """The standard error of `mean_shift`."""
        variance = self.squared_shift / self.groups - self.mean_shift**2 if self.groups else 0.0
        return (max(variance, 0.0) / self.groups) ** 0.5 if self.groups else math.inf

    def fits(self) -> dict[str, Fit]:
        """By order; "" is the one as read."""
        return {name: Fit(*_correlations(moments)) for name, moments in self._moments.items()}


def _reordered(rows: Tensor, order: list[int] | None) -> Tensor:
    """The rows, each eight of them in another order."""
    if order is None:
        return rows
    return rows.view(-1, AWQ_PACK, rows.shape[1])[:, order].reshape(rows.shape)


def _moments(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double().flatten(), y.double().flatten()
    return torch.stack(
        [torch.tensor(float(x.numel()), dtype=torch.float64), x.sum(), y.sum(), x.dot(x), y.dot(y), x.dot(y)]
    )


def _centred(moments: Tensor) -> Tensor:
    """The same with the means taken out."""
    n, x, y, xx, yy, xy = moments.unbind(1)
    zero = torch.zeros_like(n)
    return torch.stack([n, zero, zero, xx - x * x / n, yy - y * y / n, xy - x * y / n], dim=1)


def _correlations(moments: Tensor) -> tuple[float, float]:
    _, _, _, xx, yy, xy = _centred(moments).unbind(1)
    correlation = xy / (xx * yy).clamp_min(1e-30).sqrt()
    return float(correlation[0]), -float(correlation[1])
