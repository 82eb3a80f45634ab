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
FLOOR_WINDOWS = 2  # enough for its size, and a small part of an evaluation


@dataclass(frozen=True, kw_only=True)
class NoiseFloor(Summary):
    """Figures of the base with `setting` against itself in float32, over `windows` windows of the evaluation."""

    setting: str
    windows: int
    scored_tokens: int


def floor_windows(num_windows: int) -> list[int]:
    """Which windows it is measured on: evenly spread."""
    count = min(FLOOR_WINDOWS, num_windows)
    return [i * num_windows // count for i in range(count)]


def noise_floor(positions: Positions, num_windows: int) -> NoiseFloor:
    """The floor of the positions of `num_windows` windows."""
    name = str(FLOOR_DTYPE).removeprefix("torch.")
    return NoiseFloor(
        **vars(summarize(positions, num_windows)),
        setting=f"activations rounded to {name}",
        windows=num_windows,
        scored_tokens=len(positions.kld),
    )


def rows_of_windows(chosen: list[int], length: int) -> Tensor:
    """Indices of the rows that some windows have in hidden states of windows of `length` rows each."""
    return torch.cat([torch.arange(window * length, (window + 1) * length) for window in chosen])
