"""The noise floor: what computing the base itself in another number format changes.

A serving engine computes in bfloat16, and this package measures in float32. The base in bfloat16 (activations rounded
wherever an engine rounds them) differs from the base in float32 by some divergence; a candidate whose divergence is not
above that is as good as the base in practice, and two candidates that differ by less do not differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.evaluation.positions import Positions
from aphroquant.evaluation.summary import Summary, summarize

FLOOR_DTYPE = torch.bfloat16
FLOOR_WINDOWS, FLOOR_LEN = 2, 512  # the beginnings of two windows: enough for its size, a small part of the work


@dataclass(frozen=True, kw_only=True)
class NoiseFloor(Summary):
    """Figures of the base with `setting` against itself in float32, over `windows` windows of the evaluation."""

    setting: str
    windows: int
    scored_tokens: int


def noise_floor(positions: Positions, num_windows: int) -> NoiseFloor:
    """The floor of the positions of `num_windows` windows."""
    name = str(FLOOR_DTYPE).removeprefix("torch.")
    return NoiseFloor(
        **vars(summarize(positions, num_windows)),
        setting=f"activations rounded to {name}",
        windows=num_windows,
        scored_tokens=len(positions.kld),
    )


def floor_batch(batch: Tensor) -> Tensor:
    """The windows [W, S] that it is measured on, evenly spread over `batch` and no longer than FLOOR_LEN."""
    count = min(FLOOR_WINDOWS, len(batch))
    return batch[_chosen(len(batch), count), :FLOOR_LEN]


def floor_rows(batch: Tensor) -> Tensor:
    """Which of the scored positions of `batch` [W, S], in rows of S - 1, those of `floor_batch` are."""
    scored = batch.shape[1] - 1
    length = min(FLOOR_LEN - 1, scored)
    starts = (window * scored for window in _chosen(len(batch), min(FLOOR_WINDOWS, len(batch))))
    return torch.cat([torch.arange(start, start + length) for start in starts])


def _chosen(num_windows: int, count: int) -> list[int]:
    return [i * num_windows // count for i in range(count)]
