"""Log-probabilities of the raw model distribution, before any sampler."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aphroquant.engine.sampling.candidates import FloatArray, largest


class RankedLogprobs(NamedTuple):
    """The chosen token's log-probability and the likeliest tokens (id, log-probability), best first."""

    chosen: float
    top: list[tuple[int, float]]


def ranked_logprobs(logits: FloatArray, chosen: int, num_top: int) -> RankedLogprobs:
    """Log-probabilities of `chosen` and of the `num_top` likeliest tokens; of equal ones, the lower id first."""
    peak = logits.max()
    normalizer = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    top = largest(logits, num_top) if num_top else np.zeros(0, np.int64)
    descending = top[np.argsort(-logits[top], kind="stable")]
    return RankedLogprobs(
        float(logits[chosen]) - normalizer,
        [(int(token), float(logits[token]) - normalizer) for token in descending],
    )
