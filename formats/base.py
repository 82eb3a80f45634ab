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


class Part(NamedTuple):
    """What a stored tensor is: the tensor `suffix` of `module`. `entry` is set if it is one entry of a stack."""

    module: str
    suffix: str
    entry: int | None = None


class Place(NamedTuple):
    """Where a tensor of a module is stored: as the tensor `name`, or as one `entry` along its first dimension."""

    name: str
    entry: int | None = None


# How a KV cache is quantized, in the words of compressed-tensors' kv_cache_scheme: num_bits, type, strategy, ...
CacheScheme = Mapping[str, Any]


class Format(ABC):
    """One on-disk layout for quantized linear layers. Module names are dotted paths without a tensor suffix."""

    name: ClassVar[str]  # as on the command line: "gptq"
    quant_method: ClassVar[str]  # as in config.json
    tensor_names: ClassVar[frozenset[str]]  # of the tensors that a quantized module may have
    left_dense: ClassVar[frozenset[str]] = frozenset()  # modules that its readers never take for quantized

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

    def knows(self, suffix: str) -> bool:
        """Whether this format says what a tensor of this name means in a quantized module."""
        return suffix in self.tensor_names

    def scales_in(self, suffix: str, tensor: Tensor) -> Tensor | None:
        """The scales of integer codes that a stored tensor holds, in any order; None if it holds something else."""
        return tensor if suffix in ("scales", "weight_scale") else None

    def locate(self, name: str, header: TensorHeader) -> list[Part]:
        """What a stored tensor holds: one tensor of one module, or, of stacked experts, one for each entry."""
        module, _, suffix = name.rpartition(".")
        return [Part(module, suffix)]

    def place(self, module: str, suffix: str) -> Place:
        """Where `suffix` of `module` is stored. Inverse of `locate`."""
        return Place(f"{module}.{suffix}")

    def cache_scheme(self) -> CacheScheme | None:
        """What the config says of the scales of a quantized KV cache; None if nothing."""
        return None

    def with_cache_scheme(self, scheme: CacheScheme) -> Self:
        """The same, saying that there are scales of a KV cache, if this format's config has a place for it."""
        return self

    def for_model(self, dtype: torch.dtype, source: Format | None) -> Self:
        """The same for a model of this dtype, whose weights come from the format `source` (None: a dense model), if
        this format's config says what its readers compute in."""
        return self

    def side_files(self) -> dict[str, Any]:
        """JSON files beside config.json that readers of this format look for: name -> content."""
        return {}
