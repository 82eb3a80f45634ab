"""What the kernels for many tokens take of packed weights: macros, and one structure."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int32, c_void_p

import torch

from aphroquant.kernels.cuda.float8.packing import PackedFloat8
from aphroquant.kernels.cuda.integer.packing import CHUNK, ROWS, PackedInteger, chunk_bytes
from aphroquant.kernels.cuda.lookup.tables import table_macro
from aphroquant.kernels.cuda.variants import Macro

# As in stored_scales.cuh. int8 are those with supers.
SCALE_TYPES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float8_e8m0fnu: 3,
    torch.float8_e4m3fn: 4,
    torch.int8: 5,
}
_SUPER = 256  # columns that share a super
_EXACT = (torch.float16, torch.float8_e4m3fn)  # scales that fp16 holds


class PackedWeights(ctypes.Structure):
    """As in integer_stage.cuh."""

    _fields_ = (
        ("groups", c_int32),
        ("scale_factor", c_float),
        ("output_factor", c_float),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("offsets", c_void_p),
        ("supers", c_void_p),
    )

    @classmethod
    def of(cls, packed: PackedInteger, exponent: int, dtype: torch.dtype) -> PackedWeights:
        """For inputs of `dtype`; `exponent`: of `scale_exponent`."""
        return cls(
            packed.scales.shape[1],
            2.0**exponent,
            2.0**-exponent * packed.output_factor(dtype),
            packed.codes.data_ptr(),
            packed.scales.data_ptr(),
            0 if packed.zeros is None else packed.zeros.data_ptr(),
            0 if packed.offsets is None else packed.offsets.data_ptr(),
            0 if packed.supers is None else packed.supers.data_ptr(),
        )


def packed_macros(packed: PackedInteger, dtype: torch.dtype, chunks: int) -> dict[str, Macro]:
    """The macros of integer_stage.cuh, for inputs of `dtype` and `chunks` a stage."""
    table: dict[str, Macro] = {} if packed.table is None else {"CODE_TABLE": table_macro(packed.table, dtype)}
    return table | {
        "CODE_BITS": packed.bits,
        "CODE_FLOAT8": isinstance(packed, PackedFloat8),
        "GROUP": group_macro(packed),
        "ZEROS": zero_kind(packed),
        "BFLOAT": dtype == torch.bfloat16,
        "SCALE_TYPE": SCALE_TYPES[packed.scales.dtype],
        "CHUNKS": chunks,
    }


def super_row_bytes(packed: PackedInteger, chunks: int) -> int:
    """kSuperRowBytes of integer_stage.cuh."""
    size, group = packed.scales.element_size(), group_macro(packed)
    groups = 0 if group == 0 else max(1, chunks * CHUNK // group)
    groups_bytes = groups * ROWS * (size + (0, 1, size)[zero_kind(packed)])
    return chunks * chunk_bytes(packed.bits) + groups_bytes + super_bytes(packed)


def super_bytes(packed: PackedInteger) -> int:
    """Of a super row, in a stage."""
    return 0 if packed.supers is None else packed.supers.shape[2] * ROWS * 2


def zero_kind(packed: PackedInteger) -> int:
    """0: the zero point is in the middle, or there is none; 1: zero points; 2: offsets."""
    return 1 if packed.zeros is not None else 2 if packed.offsets is not None else 0


def group_macro(packed: PackedInteger) -> int:
    """The group size as the kernels take it: 0 where a row's only scale can multiply its sums."""
    return 0 if zero_kind(packed) == 0 and packed.group_size == packed.padded_columns else packed.group_size


def scale_exponent(packed: PackedInteger, dtype: torch.dtype) -> int:
    """The power of two that brings the largest scale near 1, where fp16 has to hold scales of another type."""
    if dtype != torch.float16 or packed.scales.dtype in _EXACT or group_macro(packed) == 0:
        return 0
    parts = [part.float() for part in (packed.scales, packed.offsets) if part is not None]
    if packed.supers is not None:
        supers = packed.supers.float().repeat_interleave(_SUPER // packed.group_size, 1)
        parts = [part * supers[:, :, index] for index, part in enumerate(parts)]
    largest = max(float(torch.where(part.isfinite(), part.abs(), 0).max()) for part in parts)
    return -math.frexp(largest)[1] if largest > 0 else 0
