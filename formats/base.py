"""What every checkpoint format offers: reading tensors into schemes and writing schemes into tensors.

A format instance belongs to one checkpoint: it holds the parsed `quantization_config` (reading) or the settings chosen
for a set of schemes (writing). It does no I/O: the checkpoint layer brings the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from aphroquant.schemes import QuantizedWeight, Scheme


class TensorHeader(NamedTuple):
    """What is known of a stored tensor without reading its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Format(ABC):
    """One on-disk layout for quantized linear layers. Module names are dotted paths without a tensor suffix."""

    name: ClassVar[str]  # as on the command line: "gptq"
    quant_method: ClassVar[str]  # as in config.json

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The format as a checkpoint's `quantization_config` describes it. Raises InputError naming a bad key."""

    @classmethod
    @abstractmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        """The format set up to write these modules (module name -> scheme); `dense_modules` stay as they are.

        Raises UsageError naming the module and the reason if the format cannot hold a scheme exactly."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` to put into config.json."""

    @abstractmethod
    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        """The scheme of `module`, from its tensor headers alone; None if this module is not quantized.

        `headers` maps suffixes ("qweight", "scales", ...) to headers. Raises InputError on contradicting shapes."""

    @abstractmethod
    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Decode the stored tensors (suffix -> tensor) of a module for which `scheme` is not None."""

    @abstractmethod
    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Encode: suffix -> tensor, exactly (read(write(w)) dequantizes to the same bits)."""
