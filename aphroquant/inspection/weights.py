"""Two matrices, row by row, as the numbers that they dequantize to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from aphroquant.schemes import QuantizedWeight


@dataclass
class Difference:
    """How one tensor or matrix of B differs from A's. Errors are None where a value is NaN or infinite."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    other_scheme: str
    count: int = 0
    same_bits: bool = True
    same_values: bool = True  # as numbers: 0 and -0 are the same, NaN and NaN too
    num_different: int = 0
    not_finite: int = 0
    squares: float = 0.0
    squared_error: float = 0.0
    largest: float = 0.0
    largest_error: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """The Frobenius norm of B - A, as a share of A's."""
        if self.not_finite:
            return None
        if self.squares == 0:
            return 0.0 if self.squared_error == 0 else math.inf
        return math.sqrt(self.squared_error / self.squares)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise, in dB; None where there is no noise, or no number."""
        error = self.relative_error
        return None if not error else -20 * math.log10(error)

    def to_dict(self) -> dict[str, Any]:
        error = self.relative_error
        return {
            "name": self.name,
            "shape": list(self.shape),
            "scheme": self.scheme,
            "other_scheme": self.other_scheme,
            "same_bits": self.same_bits,
            "same_values": self.same_values,
            "num_values": self.count,
            "num_different": self.num_different,
            "num_not_finite": self.not_finite,
            "relative_error": error if error is not None and math.isfinite(error) else None,
            "largest_error": self.largest_error,
            "largest_value": self.largest,
            "sqnr_db": self.sqnr_db if error is not None and math.isfinite(error) else None,
        }

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """One more piece of both, float32, of the same shape."""
        self.count += ours.numel()
        if torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
            self._add_signal(ours)
            return
        self.same_bits = False
        equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
        different = int(equal.numel() - equal.sum())
        self.num_different += different
        if different:
            self.same_values = False
        self._add_signal(ours)
        error = ours.masked_fill(equal, 0.0) - theirs.masked_fill(equal, 0.0)
        broken = ~error.isfinite()
        self.not_finite += int(broken.sum())
        error = error.masked_fill(broken, 0.0)
        self.squared_error += _sum_squares(error)
        self.largest_error = max(self.largest_error, float(error.abs().max()))

    def _add_signal(self, ours: Tensor) -> None:
        if not ours.numel():
            return
        lowest, highest = (float(edge) for edge in ours.aminmax())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            ours = ours.nan_to_num(0.0, 0.0, 0.0)
            lowest, highest = (float(edge) for edge in ours.aminmax())
        self.squares += _sum_squares(ours)
        self.largest = max(self.largest, -lowest, highest)


class Rows:
    """A matrix as flat float32 pieces; `shape` is that of the rows given out so far, all of them in the end."""

    def __init__(self, pieces: Iterable[QuantizedWeight]) -> None:
        self._pieces = pieces
        self.shape = (0, 0)

    def __iter__(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            self.shape = self.shape[0] + piece.shape[0], piece.shape[1]
            yield piece.dequantize().flatten()


@dataclass(frozen=True)
class Values:
    """A tensor of any shape in the same way."""

    pieces: Iterable[Tensor]
    shape: tuple[int, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return (piece.float() for piece in self.pieces)


def paired(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of two tensors, cut anew so that those of a pair have the same length. Reads both to their ends; of
    the longer one the rest is left out."""
    left, right = iter(ours), iter(theirs)
    first, second = torch.empty(0), torch.empty(0)
    while True:
        first, second = _filled(first, left), _filled(second, right)
        length = min(first.numel(), second.numel())
        if not length:
            for _ in chain(left, right):
                pass
            return
        yield first[:length], second[:length]
        first, second = first[length:], second[length:]


def _filled(piece: Tensor, source: Iterator[Tensor]) -> Tensor:
    """The piece, or the next one that is not empty; an empty one at the end."""
    while not piece.numel():
        following = next(source, None)
        if following is None:
            return piece
        piece = following
    return piece


def _sum_squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
