"""What gradient steps on a quantized weight need: its numbers as continuous ones, and back onto the grid.

A code is c = round(p) for a position p that moves. Taking the gradient g at the code for that at the position
("straight through", as SignRound does, arXiv 2309.05516) drives every position to the edge between two codes, where the
gradient changes its sign: in the end half of them lie on the wrong side. Here the loss's curvature h, of each weight
alone, carries the gradient from the code to the position, g + h (p - c), and sizes the step. Its balance
p = c - g / h lies within the code's own cell unless another code is really better.

On least squares with correlated inputs (64 x 256, 3 bits, 200 steps) plain signs bring the error of rounding to nearest
to 0.26 of what it was, this to about 0.05; that of GPTQ grows to 4.4 times with signs, and falls to about 0.8 with this
(with other sizes of steps than those that fit whole blocks).

The curvature is kept as a product of one number a row and one a column. Scales, and gains of norms, move by Adam, as
factors exp(a) of what they were, so that one step size fits them all.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aphroquant.calibration.integer_grid import IntegerGrid, join_groups, split_groups, to_quantized_weight
from aphroquant.schemes import IntegerScheme, QuantizedWeight

_FIRST_DECAY, _SECOND_DECAY = 0.9, 0.99  # Adam's; its usual 0.999 is too slow for a few hundred steps
_SMALLEST = 1e-30  # curvatures of single weights in large models are far below 1e-12
_MOMENTUM = 0.9  # of the gradients by codes; 0.97 is too slow
_CURVATURE_SHARE = 0.7  # that counts: the estimate is of each weight alone, and a little less did better throughout
_NEAREST_EDGE = 0.49  # of a position to its code: error feedback may have chosen a code further away


class Adam:
    """Steps of about the size that is asked for, from a running mean and square of gradients.

    Sizes of steps are tensors [] on the device here and below: work with them can be recorded and replayed.
    """

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._missing = torch.ones(2, device=like.device)  # what the two lack to be averages

    def step(self, gradient: Tensor, size: Tensor) -> Tensor:
        """What to subtract."""
        self._mean.lerp_(gradient, 1 - _FIRST_DECAY)
        self._square.mul_(_SECOND_DECAY).addcmul_(gradient, gradient, value=1 - _SECOND_DECAY)
        self._missing[0].mul_(_FIRST_DECAY)
        self._missing[1].mul_(_SECOND_DECAY)
        mean, square = self._mean / (1 - self._missing[0]), self._square / (1 - self._missing[1])
        return size * mean / square.sqrt_().clamp_(min=_SMALLEST)

    def state(self) -> dict[str, Tensor]:
        """What further steps depend on: the tensors themselves, to be filled in place."""
        return {"mean": self._mean, "square": self._square, "missing": self._missing}


class Curvature(NamedTuple):
    """The second derivative of a loss by each weight [N, K], as rows [N] times columns [K]."""

    rows: Tensor
    columns: Tensor


class CurvatureEstimate:
    """Curvature of a loss that is a mean of squares, from gradients of its terms summed with random signs.

    The square of such a gradient is, on average over the signs, the sum of the squared derivatives of all terms
    (Hutchinson's estimate); averages over rows and columns take most of the noise out.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """The gradient [N, K] of a sum of terms with random signs."""
        square = gradient.square()
        rows, columns = square.mean(1), square.mean(0)
        self._rows = rows if self._rows is None else self._rows + rows
        self._columns = columns if self._columns is None else self._columns + columns

    def finish(self, num_terms: int) -> Curvature:
        """The curvature of the mean of the squares of all terms that the gradients were made of."""
        assert self._rows is not None
        assert self._columns is not None
        mean = self._rows.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return Curvature(self._rows / mean, self._columns * (2 / num_terms))


class TrainedWeight(Protocol):
    """The numbers of a quantized weight [N, K] that steps move."""

    def value(self) -> Tensor:
        """The weight [N, K] as it is now, float32, a leaf to differentiate by."""

    def step(self, gradient: Tensor, size: Tensor) -> None:
        """One step of what is continuous, of this relative size, against the gradient [N, K] by `value()`."""

    def step_codes(self, gradient: Tensor, curvature: Curvature, size: Tensor) -> None:
        """One step of the codes, if they are moved."""

    def rounded(self) -> QuantizedWeight:
        """The weight that would be stored."""

    def moved(self) -> dict[str, Tensor]:
        """What `rounded` depends on and steps move: the tensors themselves, to be filled in place."""

    def momenta(self) -> dict[str, Tensor]:
        """What else further steps depend on, likewise."""


class TrainedInteger:
    """The numbers of an integer weight [N, K]. Without the `dense` weight that it stands for, its codes are fixed."""

    def __init__(self, weight: QuantizedWeight, dense: Tensor | None = None) -> None:
        assert isinstance(weight.scheme, IntegerScheme)
        assert "group_index" not in weight.tensors
        self.scheme, self.shape = weight.scheme, weight.shape
        self._levels = 2**self.scheme.bits - 1
        self._scale_dtype = weight["scales"].dtype
        self._first_scales = weight["scales"].float()
        self._factors = torch.zeros_like(self._first_scales)  # logarithms
        self._adam = Adam(self._factors)
        self._zeros = _zeros(weight)
        codes = split_groups(weight["codes"], self.scheme)  # [N, G, g], as are the positions
        self._positions = None if dense is None else self._positions_near(codes, dense)
        self._codes = weight["codes"] if dense is None else None
        self._mean = None if self._positions is None else torch.zeros_like(self._positions)  # of the gradients

    def value(self) -> Tensor:
        """The weight [N, K] as it is now, float32, a leaf to differentiate by."""
        levels = (self._code_values() - self._zeros[..., None]).mul_(self._scales()[..., None])
        return join_groups(levels, self.shape[1]).contiguous().requires_grad_()

    @torch.no_grad()
    def step(self, gradient: Tensor, size: Tensor) -> None:
        """One step of the scales, of this relative size, against the gradient [N, K] by `value()`."""
        grouped = split_groups(gradient, self.scheme)
        by_scale = (grouped * (self._code_values() - self._zeros[..., None])).sum(-1)
        self._factors -= self._adam.step(by_scale * self._scales(), size)

    @torch.no_grad()
    def step_codes(self, gradient: Tensor, curvature: Curvature, size: Tensor) -> None:
        """Move positions by this share of the way to where their gradients would balance, and by `size` at most."""
        assert self._positions is not None
        assert self._mean is not None
        scales = self._scales()[..., None]
        self._mean.lerp_(split_groups(gradient, self.scheme) * scales, 1 - _MOMENTUM)
        bend = split_groups(curvature.rows[:, None] * curvature.columns, self.scheme).mul_(scales.square())
        offset = (self._positions - self._code_values()).mul_(_CURVATURE_SHARE)
        way = (self._mean / bend.clamp_(min=_SMALLEST)).add_(offset)
        self._positions.sub_(way.clamp_(-1, 1).mul_(size)).clamp_(-0.5, self._levels + 0.5)

    def rounded(self) -> QuantizedWeight:
        """The weight that would be stored."""
        scales = self._scales().to(self._scale_dtype).float()
        usable = scales.isfinite() & (scales != 0)
        grid = IntegerGrid(torch.where(usable, scales, self._first_scales), self._zeros)
        codes = join_groups(self._code_values(), self.shape[1]).to(torch.uint8)
        return to_quantized_weight(codes, grid, self.scheme, self._scale_dtype)

    def moved(self) -> dict[str, Tensor]:
        """What `rounded` depends on and steps move: the tensors themselves, to be filled in place."""
        moved = {"factors": self._factors}
        return moved if self._positions is None else moved | {"positions": self._positions}

    def momenta(self) -> dict[str, Tensor]:
        """What else further steps depend on, likewise."""
        momenta = self._adam.state()
        return momenta if self._mean is None else momenta | {"codes.mean": self._mean}

    def _scales(self) -> Tensor:
        return self._first_scales * self._factors.exp()

    def _code_values(self) -> Tensor:
        """Codes as a new float32 tensor [N, G, g]."""
        if self._positions is None:
            assert self._codes is not None
            return split_groups(self._codes, self.scheme)
        return self._positions.round().clamp_(0, self._levels)

    def _positions_near(self, codes: Tensor, dense: Tensor) -> Tensor:
        exact = split_groups(dense, self.scheme) / self._first_scales[..., None] + self._zeros[..., None]
        return (exact - codes).clamp_(-_NEAREST_EDGE, _NEAREST_EDGE).add_(codes)


class TrainedGain:
    """A norm's gain [H] that is stored in `dtype`."""

    def __init__(self, gain: Tensor, dtype: torch.dtype) -> None:
        self._first, self._dtype = gain.float(), dtype
        self._factors = torch.zeros_like(self._first)
        self._adam = Adam(self._factors)

    def value(self) -> Tensor:
        """The gain as it is now, float32, a leaf to differentiate by."""
        return (self._first * self._factors.exp()).requires_grad_()

    @torch.no_grad()
    def step(self, gradient: Tensor, size: Tensor) -> None:
        """One relative step of this size against the gradient by `value()`."""
        self._factors -= self._adam.step(gradient * self._first * self._factors.exp(), size)

    def rounded(self) -> Tensor:
        """The gain that would be stored, in its dtype."""
        gain = (self._first * self._factors.exp()).to(self._dtype)
        return torch.where(gain.isfinite() & (gain != 0), gain, self._first.to(self._dtype))

    def moved(self) -> dict[str, Tensor]:
        """What `rounded` depends on and steps move: the tensors themselves, to be filled in place."""
        return {"factors": self._factors}

    def momenta(self) -> dict[str, Tensor]:
        """What else further steps depend on, likewise."""
        return self._adam.state()


def _zeros(weight: QuantizedWeight) -> Tensor:
    """Zero points, float32 [N, G]."""
    assert isinstance(weight.scheme, IntegerScheme)
    if weight.scheme.symmetric:
        return torch.full_like(weight["scales"], 2 ** (weight.scheme.bits - 1), dtype=torch.float32)
    return weight["zeros"].float()
