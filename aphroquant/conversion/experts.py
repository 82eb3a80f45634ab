"""Which calibration tokens a block's experts see.

An expert is solved on the tokens that the router sends it, as the model will use it. One that gets too few to tell its
inputs apart is solved on all tokens of the block instead, which is nearer to the truth than no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aphroquant.conversion.activations import CHUNK_TOKENS, Activations
from aphroquant.kernels.reference.grouped import group_tokens
from aphroquant.models.decoder import DecoderBlock


class RoutedTokens:
    """The tokens of all windows by expert. `inputs` are those of the experts [T, H]."""

    def __init__(self, block: DecoderBlock, inputs: Activations, device: torch.device) -> None:
        assert block.spec.experts is not None
        self._inputs, self._device = inputs, device
        parts = [block.choose(inputs.rows[rows].to(device)) for rows in _slices(len(inputs))]
        self._weights = torch.cat([weights for weights, _ in parts]).cpu()  # [T, k]
        ids = torch.cat([ids for _, ids in parts]).cpu()
        self._groups = group_tokens(ids, block.spec.experts.num_experts)
        self._pairs = torch.empty(ids.numel(), dtype=torch.int64)
        self._pairs[self._groups.places.flatten().long()] = torch.arange(ids.numel())

    def count(self, expert: int) -> int:
        """Tokens of an expert."""
        return int(self._groups.offsets[expert + 1] - self._groups.offsets[expert])

    def is_known(self, expert: int, width: int) -> bool:
        """Whether it has as many tokens as its inputs have dimensions: with fewer, some are never seen."""
        return self.count(expert) >= width

    def tokens(self, expert: int, width: int) -> Tensor:
        """The tokens that an expert with inputs of `width` is solved on, as indices."""
        return self._own(expert) if self.is_known(expert, width) else torch.arange(len(self._inputs))

    def inputs(self, tokens: Tensor) -> Iterator[Tensor]:
        """The inputs of these tokens, a part at a time, on the device."""
        place = self._inputs.rows.device
        for rows in _slices(tokens.shape[0]):
            yield self._inputs.rows[tokens[rows].to(place)].to(self._device)

    def uses(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, the expert's weight for each), a part at a time, as the router has them."""
        start, end = int(self._groups.offsets[expert]), int(self._groups.offsets[expert + 1])
        tokens, weights = self._own(expert), self._weights.flatten()[self._pairs[start:end]]
        for rows in _slices(end - start):
            yield tokens[rows], weights[rows]

    def report(self, expert: int, width: int) -> dict[str, Any]:
        """For an expert's modules."""
        return {"tokens": self.count(expert), "calibrated_on": "own" if self.is_known(expert, width) else "all tokens"}

    def warning(self, num_experts: int, width: int) -> str | None:
        """One sentence about the experts that were not solved on their own tokens."""
        unknown = [expert for expert in range(num_experts) if not self.is_known(expert, width)]
        if not unknown:
            return None
        none = sum(self.count(expert) == 0 for expert in unknown)
        return (
            f"{len(unknown)} of {num_experts} experts got fewer than {width} calibration tokens ({none} got none) and "
            "were solved on the tokens of all"
        )

    def _own(self, expert: int) -> Tensor:
        return self._groups.rows[self._groups.offsets[expert] : self._groups.offsets[expert + 1]].long()


def _slices(num_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_TOKENS, num_tokens)) for start in range(0, num_tokens, CHUNK_TOKENS))
