"""EXL3: QTIP's trellis codes between Hadamard rotations, read for every bit width and codebook of the library.

    P.trellis int16 [K/16, N/16, 16 * bits]    P.suh float16 [K]    P.svh float16 [N]
    P.mcg or P.mul1, int32 of one number: which codebook; neither: 3inst

The tensors tell the bits, 1 to 8 and with mul1 1.5, 2.5 and 3.5, for each module; the config's are only their mean.
Older files have the signs alone, as bits: su int16 [K/16] and sv int16 [N/16]. The library stores layers of other
widths than multiples of 128 padded with zeros, and so they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.schemes import CodebookName, QuantizedWeight, Scheme, TrellisScheme

LAYOUT_VERSION = "1.6.5"  # the release of the library whose layout is written
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # what these tensors hold: their codebook's multiplier
TILE = 16
_SIGNS = {"suh": "su", "svh": "sv"}


@dataclass(frozen=True)
class Exl3(Format):
    """EXL3 checkpoints. What is known of them: the mean bits of the layers, those of lm_head, the layers' codebook."""

    name: ClassVar[str] = "exl3"
    quant_method: ClassVar[str] = "exl3"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"trellis", *_SIGNS, *_SIGNS.values(), *MARKERS})

    bits: float | None = None
    head_bits: float | None = None
    codebook: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        codebook = reading.read_text(config, "codebook", default="") or None
        return cls(_bits(config, "bits"), _bits(config, "head_bits"), codebook)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        widths, codebooks = {}, set()
        for module, scheme in writing.quantized(schemes).items():
            if not isinstance(scheme, TrellisScheme):
                raise UsageError(f"{module}: exl3 holds trellis codes, not {scheme}", hint=writing.REQUANTIZE)
            widths[module] = scheme.bits
            codebooks.add(scheme.codebook)
        head_bits = widths.pop(writing.LM_HEAD, None)
        codebook = codebooks.pop() if len(codebooks) == 1 else None
        return cls(sum(widths.values()) / len(widths) if widths else None, head_bits, codebook)

    def quantization_config(self) -> dict[str, Any]:
        known = {"bits": self.bits, "head_bits": self.head_bits, "codebook": self.codebook}
        return {"quant_method": "exl3", "version": LAYOUT_VERSION} | {k: v for k, v in known.items() if v is not None}

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "trellis" not in headers:
            return None
        found = reading.require(module, headers, "trellis", (torch.int16,)).shape
        if len(found) != 3 or 0 in found:
            raise InputError(f"{module}.trellis has shape {list(found)}, but must be [K/16, N/16, 16 * bits]")
        for name, size in (("suh", found[0] * TILE), ("svh", found[1] * TILE)):
            if name in headers:
                reading.require_shape(module, headers, name, (torch.float16,), (size,))
            else:
                reading.require_shape(module, headers, _SIGNS[name], (torch.int16,), (size // TILE,))
        codebook = _codebook(module, headers)
        if self.codebook in MARKERS and codebook not in MARKERS:
            raise InputError(
                f"{module} has no {self.codebook}, although quantization_config says that this is its codebook",
                hint="the file is damaged; without codebook in quantization_config it is read as 3inst",
            )
        try:
            scheme = TrellisScheme(found[2] / TILE, codebook)
            scheme.shapes(found[1] * TILE, found[0] * TILE)
        except (UsageError, InputError) as error:
            raise InputError(f"{module}.trellis has shape {list(found)}: {error.message}") from error
        return scheme

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        assert isinstance(scheme, TrellisScheme)
        _check_marker(module, scheme, tensors)
        trellis = tensors["trellis"].contiguous()
        canonical = {
            "rings": trellis.view(torch.int32),  # both little-endian
            "input_scales": _scales(tensors, "suh"),
            "output_scales": _scales(tensors, "svh"),
        }
        return QuantizedWeight(scheme, canonical, (trellis.shape[1] * TILE, trellis.shape[0] * TILE))

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = weight.scheme
        if not isinstance(scheme, TrellisScheme):
            raise UsageError(f"{module}: exl3 holds trellis codes, not {scheme}", hint=writing.REQUANTIZE)
        writing.checked(module, weight, scheme)
        tensors = {
            "suh": weight["input_scales"].contiguous(),
            "svh": weight["output_scales"].contiguous(),
            "trellis": weight["rings"].contiguous().view(torch.int16),
        }
        if scheme.codebook in MARKERS:
            tensors[scheme.codebook] = torch.tensor(MARKERS[scheme.codebook], dtype=torch.uint32).view(torch.int32)
        return tensors


def _bits(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 16:
        raise InputError(f"quantization_config: {name} = {value!r} must be a number of bits, at most 16")
    return float(value)


def _codebook(module: str, headers: Mapping[str, TensorHeader]) -> CodebookName:
    markers = [name for name in MARKERS if name in headers]
    if len(markers) > 1:
        raise InputError(f"{module} has both {' and '.join(markers)}, which are two codebooks")
    return cast(CodebookName, markers[0] if markers else "3inst")


def _check_marker(module: str, scheme: TrellisScheme, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a codebook of another multiplier: its numbers would be noise."""
    if scheme.codebook not in MARKERS:
        return
    marker = tensors[scheme.codebook]
    if marker.numel() != 1 or marker.dtype.is_floating_point:
        raise InputError(f"{module}.{scheme.codebook} has shape {list(marker.shape)}, but must be one integer")
    found = int(marker) % 2**32
    if found != MARKERS[scheme.codebook]:
        raise InputError(
            f"{module}.{scheme.codebook} = {found:#x} is an unknown codebook; {MARKERS[scheme.codebook]:#x} is known"
        )


def _scales(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """float16: as stored, or 1 and -1 of the bits of older files, a set bit for -1."""
    if name in tensors:
        return tensors[name]
    fields = tensors[_SIGNS[name]].int()[:, None] >> torch.arange(TILE, dtype=torch.int32)
    return (1 - 2 * (fields & 1)).flatten().to(torch.float16)
