"""Samplers that scale the logits of a row or narrow its candidates. The likeliest token always stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aphroquant.engine.sampling.candidates import Candidates, largest


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

    The vocabulary is not sorted: tokens above some probability are taken first, and only if their mass does not reach
    `top_p` is the bar lowered. Any set "all tokens above a bar" with enough mass contains the nucleus.
    """

    top_p: float

    def __call__(self, candidates: Candidates) -> Candidates:
        weights = np.exp(candidates.logits - candidates.logits.max())
        needed = self.top_p * float(weights.sum(dtype=np.float64))
        for bar in (1e-2, 1e-4, 1e-6, 0.0):
            indices = np.flatnonzero(weights >= bar)
            if float(weights[indices].sum(dtype=np.float64)) >= needed:
                break
        descending = indices[np.argsort(-weights[indices], kind="stable")]
        mass = np.cumsum(weights[descending], dtype=np.float64)
        count = int(np.searchsorted(mass, needed)) + 1
        return candidates.keep(np.sort(descending[:count]))
