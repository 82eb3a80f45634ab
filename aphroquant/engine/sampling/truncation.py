"""Samplers that scale the logits of a row or narrow its candidates. The likeliest token always stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aphroquant.engine.sampling.candidates import Candidates, down_to, largest


class Truncation(Protocol):
    """Candidates in, the same or fewer out; the input is not modified."""

    def __call__(self, candidates: Candidates) -> Candidates: ...


@dataclass(frozen=True)
class Temperature:
    """Divide the logits: below 1 sharpens, above 1 flattens."""

    temperature: float

    def __call__(self, candidates: Candidates) -> Candidates:
        shifted = candidates.logits - candidates.logits.max()  # at most 0: a tiny temperature cannot overflow to inf
        return Candidates(candidates.ids, shifted / np.float32(self.temperature))


@dataclass(frozen=True)
class TopK:
    """Keep the k likeliest tokens."""

    k: int

    def __call__(self, candidates: Candidates) -> Candidates:
        return candidates.keep(largest(candidates.logits, self.k))


@dataclass(frozen=True)
class MinP:
    """Keep tokens with at least `min_p` times the probability of the likeliest one."""

    min_p: float

    def __call__(self, candidates: Candidates) -> Candidates:
        edge = candidates.logits.max() + np.float32(math.log(self.min_p))
        return candidates.keep(np.flatnonzero(candidates.logits >= edge))


@dataclass(frozen=True)
class TopP:
    """Keep the fewest likeliest tokens whose probabilities reach `top_p`, the one that crosses it included.

    Only values are sorted, never indices (20 times slower), and the whole vocabulary only if the tokens with at least
    a thousandth of the highest probability do not reach `top_p`: any set "all above a bar" that does contains the
    nucleus.
    """

    top_p: float

    def __call__(self, candidates: Candidates) -> Candidates:
        weights = np.exp(candidates.logits - candidates.logits.max())
        needed = self.top_p * float(weights.sum(dtype=np.float64))
        likely = weights[weights >= 1e-3]
        if float(likely.sum(dtype=np.float64)) < needed:
            likely = weights
        descending = np.sort(likely)[::-1]
        mass = np.cumsum(descending, dtype=np.float64)
        count = min(int(np.searchsorted(mass, needed)) + 1, len(descending))
        return candidates.keep(down_to(weights, descending[count - 1], count))
