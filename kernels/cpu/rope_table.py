"""cos and sin of all positions so far, for the compiled rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.models.rope import cos_sin
from aphroquant.models.spec import DecoderSpec

FIRST_POSITIONS = 2048


class RopeTable:
    """`cos` and `sin`, float32 [positions, head_dim / 2]; grows when a position beyond it is asked for."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self.cos, self.sin = torch.empty(0), torch.empty(0)
        self.cover(min(FIRST_POSITIONS, spec.max_position_embeddings) - 1)

    def cover(self, position: int) -> None:
        """Make sure that `position` is in the table."""
        if position < self.cos.shape[0]:
            return
        count = max(position + 1, 2 * self.cos.shape[0])
        cos, sin = cos_sin(self._spec.rope, self._spec.head_dim, torch.arange(count))
        self.cos, self.sin = cos.contiguous(), sin.contiguous()

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        self.cover(position)
        return self.cos, self.sin
