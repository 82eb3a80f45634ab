"""A block computed as a serving engine would in a narrow dtype: every activation rounded to it.

Weights stay as they are and products are summed in float32, as matrix units do. What differs from float32 is then what
the dtype alone costs, whatever the kernels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.models.decoder import Attend, CosSin, DecoderBlock, Linear
from aphroquant.models.spec import INPUT_NORM, POST_ATTENTION_NORM


class RoundedBlock(DecoderBlock):
    """The same weights and norms as `block`; inputs and outputs of linears and the residual stream are rounded."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        linears = {name: _rounding(linear, dtype) for name, linear in block.linears.items()}
        super().__init__(block.spec, block.layer, linears, block.norms, block.router)
        self._dtype = dtype

    def forward(self, hidden: Tensor, rope: CosSin, attend: Attend) -> Tensor:
        hidden = rounded(hidden, self._dtype)
        hidden = rounded(hidden + self.attention(self.norm(INPUT_NORM, hidden), rope, attend), self._dtype)
        return rounded(hidden + self.mlp(self.norm(POST_ATTENTION_NORM, hidden)), self._dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in its own dtype, with the values that `dtype` holds."""
    return x.to(dtype).to(x.dtype)


def _rounding(linear: Linear, dtype: torch.dtype) -> Linear:
    return lambda x: rounded(linear(rounded(x, dtype)), dtype)
