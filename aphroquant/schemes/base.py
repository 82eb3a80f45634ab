"""What every scheme can tell about its canonical tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class BaseScheme(ABC):
    """A kind of numbers. Schemes are frozen dataclasses: equal ones hold the same kind."""

    @abstractmethod
    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that a weight [N, K] needs. InputError if there can be none."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        """The weight [N, K], computed in `work` (float32 or float64)."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """The tensors whose dtype decides what their bytes mean."""
        return {}

    def storage_bits(self, name: str) -> int | None:
        """How many bits one number of that tensor needs; None for as many as its dtype has."""
        return None
