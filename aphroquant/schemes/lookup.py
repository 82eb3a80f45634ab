"""Four-bit codes into a fixed table, with a scale for each small block: NF4, FP4, MXFP4, NVFP4, IQ4_NL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes.activation import ActivationScheme
from aphroquant.schemes.base import BaseScheme

TableName = Literal["nf4", "fp4", "e2m1", "iq4_nl"]
ScaleKind = Literal["float", "nested", "e8m0", "e4m3"]

# The index is the code. nf4: quantiles of a normal distribution. fp4: bitsandbytes' own order of its own four-bit
# floats. e2m1: sign, two bits of exponent, one of mantissa, as in the OCP microscaling formats. iq4_nl: GGUF's own
# integers, denser around zero.
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TABLES: Mapping[TableName, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
    "e2m1": (*_E2M1, *(-value for value in _E2M1)),
    "iq4_nl": tuple(map(float, _IQ4_NL)),
}
NESTED_BLOCK_SIZE = 256  # block scales that share a scale, when they are themselves quantized
_SCALE_DTYPES: Mapping[ScaleKind, torch.dtype] = {
    "nested": torch.uint8,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}


def num_blocks(count: int, block_size: int) -> int:
    """How many blocks cover `count` elements, exactly whatever the sizes."""
    return -(-count // block_size)


@dataclass(frozen=True)
class LookupScheme(BaseScheme):
    """W = table[codes] * (block scale * global scale), the table being rounded to float32.

    Tensors of the weight, S being [N, ceil(K / block_size)], or [ceil(N*K / block_size)] if the blocks run over the
    `flattened` weight and may cross rows:
        codes   uint8 [N, K], 0 .. 15
        scales  S, in float | uint8 | float8_e8m0fnu | float8_e4m3fn for `scales` float | nested | e8m0 | e4m3
        nested_table  float32 [256], nested_scales float32 [ceil(blocks / 256)], nested_offset float32 []: if nested,
            block scale i = nested_table[scales[i]] * nested_scales[i // 256] + nested_offset
        global_scale  float64 [], only with e4m3. Some files hold its reciprocal, and double precision is enough to give
            both readings to the last bit: block scale * global_scale rounds to what the division rounds to
        input_scale   float64 [], only if `has_input_scale`: the same, for inputs in blocks
    """

    table: TableName
    block_size: int
    scales: ScaleKind
    flattened: bool = False
    activations: ActivationScheme | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block_size = {self.block_size} must be positive")
        if self.scales == "nested" and not self.flattened:
            raise UsageError("nested scales are those of a flattened weight")

    @property
    def bits(self) -> int:
        return 4

    @property
    def has_input_scale(self) -> bool:
        """Whether inputs need a number from the checkpoint: static ones, and e4m3 block scales under a global one."""
        if self.activations is None:
            return False
        return not self.activations.dynamic or (self.scales == "e4m3" and self.activations.bits == 4)

    def __str__(self) -> str:
        scales = {"float": "", "nested": " double-quantized", "e8m0": " e8m0", "e4m3": " e4m3"}[self.scales]
        flattened = " flat" if self.flattened else ""
        inputs = f" x {self.activations.kind}{self.activations.bits} inputs" if self.activations else ""
        return f"{self.table} g{self.block_size}{scales}{flattened}{inputs}"

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        per_row = (out_features, num_blocks(in_features, self.block_size))
        blocks = num_blocks(out_features * in_features, self.block_size)
        shapes: dict[str, tuple[int, ...]] = {
            "codes": (out_features, in_features),
            "scales": (blocks,) if self.flattened else per_row,
        }
        if self.scales == "nested":
            groups = num_blocks(blocks, NESTED_BLOCK_SIZE)
            shapes |= {"nested_table": (256,), "nested_scales": (groups,), "nested_offset": ()}
        if self.scales == "e4m3":
            shapes["global_scale"] = ()
        if self.has_input_scale:
            shapes["input_scale"] = ()
        return shapes

    def dtypes(self) -> dict[str, torch.dtype]:
        scales = {"scales": _SCALE_DTYPES[self.scales]} if self.scales in _SCALE_DTYPES else {}
        return {"codes": torch.uint8} | scales

    def storage_bits(self, name: str) -> int | None:
        if name == "codes":
            return self.bits
        return 32 if name in ("global_scale", "input_scale") else None

    def table_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table [16]: float32 values, also where `dtype` is wider."""
        return torch.tensor(TABLES[self.table], dtype=torch.float32).to(dtype)

    def block_scales(self, tensors: Mapping[str, Tensor], work: torch.dtype = torch.float32) -> Tensor:
        """What a table value is multiplied with, for each block: the shape of `scales`, global scale included."""
        scales = tensors["scales"]
        if self.scales == "nested":
            groups = torch.arange(scales.shape[0], device=scales.device) // NESTED_BLOCK_SIZE
            factors = tensors["nested_scales"].to(work)[groups]
            return tensors["nested_table"].to(work)[scales.int()] * factors + tensors["nested_offset"].to(work)
        if self.scales == "e4m3":
            return (scales.double() * tensors["global_scale"].double()).to(work)
        return scales.to(work)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        codes, scales = tensors["codes"], self.block_scales(tensors, work)
        values = _table_on(self, work, codes.device)[codes.int()]  # [N, K]
        if self.flattened:
            return (values.flatten() * scales.repeat_interleave(self.block_size)[: codes.numel()]).reshape(shape)
        return values * scales.repeat_interleave(self.block_size, 1)[:, : shape[1]]


@cache
def _table_on(scheme: LookupScheme, work: torch.dtype, device: torch.device) -> Tensor:
    """Copied to a device once: a graph that is captured there may not copy from the processor's memory."""
    return scheme.table_values(work).to(device)
