"""AQLM: each group of weights is a scaled sum of one vector from each of M codebooks.

    P.codes intX [N/out_group, K/in_group, M]    P.codebooks float16 [M, 2**b, out_group, in_group]
    P.scales float16 [N/out_group, 1, 1, 1]

Codes of b bits are stored as two's complement in the smallest of int8, int16 and int32 that holds them: the index is
the code modulo 2**b. The sizes M, b, out_group and in_group are the same for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.schemes import AdditiveScheme, QuantizedWeight, Scheme

_SIZES = ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")
_DEFAULTS = (1, 16, 1, 8)  # transformers' own


@dataclass(frozen=True)
class Aqlm(Format):
    """AQLM checkpoints. All quantized modules have one scheme."""

    name: ClassVar[str] = "aqlm"
    quant_method: ClassVar[str] = "aqlm"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"codes", "codebooks", "scales"})

    layout: AdditiveScheme
    linear_weights_not_to_quantize: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sizes = [
            reading.read_integer(config, name, default=default) for name, default in zip(_SIZES, _DEFAULTS, strict=True)
        ]
        try:
            layout = AdditiveScheme(*sizes)
        except UsageError as error:
            raise InputError(f"quantization_config: {', '.join(_SIZES)} = {sizes}: {error.message}") from error
        return cls(layout, reading.read_names(config, "linear_weights_not_to_quantize"))

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        held: dict[str, AdditiveScheme] = {}
        for module, scheme in writing.quantized(schemes).items():
            if not isinstance(scheme, AdditiveScheme):
                raise UsageError(f"{module}: aqlm holds sums of codebooks, not {scheme}", hint=writing.REQUANTIZE)
            held[module] = scheme
        writing.same_for_all("aqlm", "scheme", held)
        names = []
        for module in writing.left_dense_with_head(schemes, dense_modules):
            names += [f"{module}.weight", module]  # transformers 4 looks for the first, 5 for the second
        return cls(next(iter(held.values()), AdditiveScheme(*_DEFAULTS)), tuple(names))

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "aqlm",
            "nbits_per_codebook": self.layout.code_bits,
            "num_codebooks": self.layout.num_codebooks,
            "out_group_size": self.layout.out_group,
            "in_group_size": self.layout.in_group,
            "linear_weights_not_to_quantize": list(self.linear_weights_not_to_quantize),
        }

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "codes" not in headers and "codebooks" not in headers:
            return None
        out_groups, in_groups = self._groups(module, headers)
        shapes = self.layout.shapes(out_groups * self.layout.out_group, in_groups * self.layout.in_group)
        reading.require_shape(module, headers, "codebooks", reading.SCALE_DTYPES, shapes["codebooks"])
        reading.require_shape(module, headers, "scales", reading.SCALE_DTYPES, (out_groups, 1, 1, 1))
        return self.layout

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        headers = reading.headers_of(tensors)
        assert self.scheme(module, headers) is not None
        out_groups, in_groups = self._groups(module, headers)
        canonical = {
            "codes": self._unsigned(f"{module}.codes", tensors["codes"]),
            "codebooks": tensors["codebooks"],
            "scales": tensors["scales"].flatten(),
        }
        shape = (out_groups * self.layout.out_group, in_groups * self.layout.in_group)
        return QuantizedWeight(self.layout, canonical, shape)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        writing.checked(module, weight, self.layout)
        codes = weight["codes"].to(torch.int32)
        upper_half = codes >= 2 ** (self.layout.code_bits - 1)
        signed = torch.where(upper_half, codes.long() - 2**self.layout.code_bits, codes)
        return {
            "codes": signed.to(_code_dtype(self.layout.code_bits)),
            "codebooks": weight["codebooks"].contiguous(),
            "scales": weight["scales"].reshape(-1, 1, 1, 1),
        }

    def _groups(self, module: str, headers: Mapping[str, TensorHeader]) -> tuple[int, int]:
        """N / out_group and K / in_group, from the codes' header."""
        found = reading.require(module, headers, "codes", (_code_dtype(self.layout.code_bits),)).shape
        if len(found) != 3 or 0 in found or found[2] != self.layout.num_codebooks:
            raise InputError(
                f"{module}.codes has shape {list(found)}, but must be [output groups, input groups, num_codebooks = "
                f"{self.layout.num_codebooks}]"
            )
        return found[0], found[1]

    def _unsigned(self, name: str, codes: Tensor) -> Tensor:
        """Two's complement of `code_bits` as indices. The library takes unsigned ones as well, as far as they fit."""
        bits = self.layout.code_bits
        lowest, highest = (int(edge) for edge in codes.aminmax())
        if lowest < -(2 ** (bits - 1)) or highest >= 2**bits:
            worst = lowest if lowest < -(2 ** (bits - 1)) else highest
            raise InputError(f"{name} has the value {worst}, which is no code of {bits} bits")
        indices = codes.to(torch.int32).bitwise_and(2**bits - 1)
        return indices.to(self.layout.dtypes()["codes"])


def _code_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
