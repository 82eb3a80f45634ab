"""Tokens still in the running for one draw, and the selection that several samplers share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class Candidates(NamedTuple):
    """Token ids in ascending order (None: the whole vocabulary) with a finite or -inf logit each, one at least finite.

    Ascending, not sorted by logit: then logits that differ in the last bit lead to the same draw.
    """

    ids: IntArray | None
    logits: FloatArray

    def keep(self, indices: IntArray) -> Candidates:
        """Only the candidates at these ascending indices."""
        return Candidates(indices if self.ids is None else self.ids[indices], self.logits[indices])


def largest(values: FloatArray, count: int) -> IntArray:
    """Ascending indices of the `count` largest values; of equal ones at the edge, the first."""
    if count >= len(values):
        return np.arange(len(values))
    edge = np.partition(values, len(values) - count)[len(values) - count]  # a third of the time of a full sort
    return down_to(values, edge, count)


def down_to(values: FloatArray, edge: np.float32, count: int) -> IntArray:
    """The same for whoever knows `edge`, the smallest of the `count` largest values."""
    above = np.flatnonzero(values > edge)
    at_edge = np.flatnonzero(values == edge)[: count - len(above)]
    return np.sort(np.concatenate((above, at_edge)))
