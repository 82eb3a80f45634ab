"""Blocks of a model with numbers that gradients are wanted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.training import TrainedAdditive
from aphroquant.calibration.differentiable import linear
from aphroquant.calibration.training import TrainedInteger, TrainedWeight
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.models.decoder import CosSin, DecoderBlock, Linear, causal_attention
from aphroquant.models.rope import cos_sin
from aphroquant.models.spec import (
    DOWN,
    GATE,
    INPUT_NORM,
    K_NORM,
    POST_ATTENTION_NORM,
    Q_NORM,
    UP,
    DecoderSpec,
    K,
    O,
    Q,
    V,
)
from aphroquant.schemes import AdditiveScheme, QuantizedWeight

# A gain is moved only if all that reads it is quantized: what stays dense is carried over as it is.
NORM_READERS = {INPUT_NORM: (Q, K, V), POST_ATTENTION_NORM: (GATE, UP), Q_NORM: (Q,), K_NORM: (K,)}
LINEARS = (Q, K, V, O, GATE, UP, DOWN)


class WindowForward:
    """Runs blocks on hidden states [windows * window_len, H] with given numbers, differentiably."""

    def __init__(self, spec: DecoderSpec, window_len: int, device: torch.device) -> None:
        self._spec, self._window_len, self._device = spec, window_len, device
        self._attend = causal_attention(spec, window_len)
        self._ropes: dict[int, CosSin] = {}

    def block(
        self,
        block: CalibrationBlock,
        weights: Mapping[str, Tensor],
        gains: Mapping[str, Tensor],
        hidden: Tensor,
        router: Linear | None = None,
    ) -> Tensor:
        """The output [T, H] of `block` with these weights and gains in place of some of its own; a block of experts
        needs a `router` that gradients pass through."""
        linears: dict[str, Callable[[Tensor], Tensor]] = {
            name: partial(linear, weight=weights.get(name, own.weight), bias=own.bias)
            for name, own in block.linears.items()
        }
        norms = {**block.norms, **gains}
        return DecoderBlock(self._spec, block.block.layer, linears, norms, router).forward(
            hidden, self._rope(hidden.shape[0] // self._window_len), self._attend
        )

    def _rope(self, num_windows: int) -> CosSin:
        if num_windows not in self._ropes:
            positions = torch.arange(self._window_len).repeat(num_windows)
            cos, sin = cos_sin(self._spec.rope, self._spec.head_dim, positions)
            self._ropes[num_windows] = cos.to(self._device), sin.to(self._device)
        return self._ropes[num_windows]


def trained_weight(weight: QuantizedWeight, dense: Tensor | None = None) -> TrainedWeight:
    """What steps move of a weight. Codes of integers move where the `dense` weight that they stand for is given."""
    if isinstance(weight.scheme, AdditiveScheme):
        return TrainedAdditive(weight)
    return TrainedInteger(weight, dense)


def trained_norms(block: CalibrationBlock, quantized: Callable[[str], bool]) -> list[str]:
    """The norms of a block whose gains may be moved."""
    return [
        norm
        for norm, readers in NORM_READERS.items()
        if norm in block.norms and all(quantized(f"{block.prefix}.{name}") for name in readers)
    ]
