"""Activations to FP8 e4m3 codes and their scales, in one launch."""

from __future__ import annotations

from ctypes import c_int32
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.kernels.cuda.fused.elements import element_macro, row_threads, vector_width
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

GROUP = 128  # columns that share a scale
_THREADS = 256
_GROUP_THREADS = 16
_MAX_KEPT = 4  # vectors of a row that a thread keeps in registers
_ALIGNMENT = 16  # bytes at which the matrix units' copies begin


class Granularity(IntEnum):
    """What shares a scale; the values are those of MODE in float8_quantize.cu."""

    TOKEN = 0
    GROUP = 1
    GIVEN = 2


class Float8Tokens(NamedTuple):
    """Codes e4m3 [T, K rounded up to 16] and float32 scales: [T], [groups, padded T], or the given one."""

    codes: Tensor
    scales: Tensor


def quantize_tokens(
    x: Tensor, granularity: Granularity, *, scale: Tensor | None = None, padded_tokens: int = 0
) -> Float8Tokens:
    """bf16 or fp16 [T, K], contiguous, to codes. A dynamic scale is absmax / 448, and 1 for zeros.

    `scale`: float32, one number, for Granularity.GIVEN. `padded_tokens`: length of a group's line of scales.
    """
    tokens, columns = x.shape
    stride = columns + -columns % _ALIGNMENT
    codes = torch.empty(tokens, stride, dtype=torch.float8_e4m3fn, device=x.device)
    macros, blocks = quantize_macros(x.dtype, granularity, columns), 1
    if granularity is Granularity.GROUP:
        groups = -(-columns // GROUP)
        scale = torch.empty(groups, padded_tokens, dtype=torch.float32, device=x.device)
        blocks = -(-groups * _GROUP_THREADS // int(macros["THREADS"]))
    elif granularity is Granularity.TOKEN:
        scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    assert scale is not None
    cuda_kernel("float8_quantize.cu", "float8_quantize", macros).launch(
        grid=(tokens, blocks, 1),
        block=(int(macros["THREADS"]), 1, 1),
        args=[x, codes, scale, c_int32(columns), c_int32(stride), c_int32(padded_tokens)],
        programmatic=True,
    )
    return Float8Tokens(codes, scale)


def quantize_macros(dtype: torch.dtype, granularity: Granularity, columns: int) -> dict[str, Macro]:
    """Those of float8_quantize.cuh for rows of that size."""
    vector, threads, kept = vector_width(columns), _THREADS, 0
    if granularity is Granularity.TOKEN:
        threads = row_threads(columns)
        kept = -(-columns // (vector * threads))
    kept = kept if kept <= _MAX_KEPT else 0
    return {**element_macro(dtype), "MODE": int(granularity), "VECTOR": vector, "THREADS": threads, "KEPT": kept}
