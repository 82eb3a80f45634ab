"""What the fused kernels share: element types, output formats, vector widths."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.errors import UsageError

ELEMENT_DTYPES = (torch.bfloat16, torch.float16)


class OutputFormat(IntEnum):
    """What a kernel gives out; the values are those of OUTPUT_FORMAT in fused_quantize.cuh."""

    ELEMENT = 0
    FLOAT8 = 1
    INT8 = 2


class Quantized(NamedTuple):
    """8-bit codes [T, N], float8_e4m3fn or int8, and the scale of each row, float32 [T]."""

    codes: Tensor
    scales: Tensor


def element_macro(dtype: torch.dtype) -> dict[str, int]:
    """The macro of fused_elements.cuh. UsageError for a dtype that the kernels do not compute in."""
    if dtype not in ELEMENT_DTYPES:
        raise UsageError(f"dtype = {dtype} must be torch.bfloat16 or torch.float16")
    return {"ELEMENT_IS_BF16": int(dtype == torch.bfloat16)}


def vector_width(size: int, limit: int = 8) -> int:
    """Items in one access: the largest power of two up to `limit` that divides `size`."""
    return next(width for width in (8, 4, 2, 1) if width <= limit and size % width == 0)


def row_threads(size: int, items: int = 2) -> int:
    """Threads of a block that has a row of `size`: whole warps, about `items` vectors a thread, at most 1024."""
    vectors = size // vector_width(size)
    return min(1024, max(32, -(-vectors // items) + 31 & ~31))


def empty_output(shape: tuple[int, int], like: Tensor, output: OutputFormat, dtype: torch.dtype) -> Quantized:
    """Memory for a result; without quantization `codes` are elements and `scales` is empty."""
    kinds = {OutputFormat.ELEMENT: dtype, OutputFormat.FLOAT8: torch.float8_e4m3fn, OutputFormat.INT8: torch.int8}
    num_scales = shape[0] if output is not OutputFormat.ELEMENT else 0
    codes = torch.empty(shape, dtype=kinds[output], device=like.device)
    return Quantized(codes, torch.empty(num_scales, dtype=torch.float32, device=like.device))
