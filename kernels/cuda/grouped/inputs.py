"""Inputs of sorted tokens, as the kernels for many tokens read them."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from aphroquant.kernels.cuda.float8.quantize import GROUP, Float8Tokens, Granularity, quantize_macros
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups
from aphroquant.kernels.cuda.launcher import cuda_kernel

_ALIGNMENT = 8  # 16-bit elements: rows begin at multiples of 16 bytes
_CODE_ALIGNMENT = 16
_THREADS = 256
_GROUP_THREADS = 16


class _Gather(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("rows", c_void_p),
        ("owners", c_void_p),
        ("columns", c_void_p),
        ("count", c_void_p),
        ("y", c_void_p),
        ("width", c_int32),
        ("padded", c_int32),
    )


class _Quantize(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("rows", c_void_p),
        ("owners", c_void_p),
        ("lines", c_void_p),
        ("count", c_void_p),
        ("given", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("columns", c_int32),
        ("stride", c_int32),
        ("scale_stride", c_int32),
    )


def gather_inputs(x: Tensor, groups: CudaTokenGroups, columns: Tensor | None, in_order: bool) -> Tensor:
    """x [T, K], or [T * k, K] in the order of places, in that order: [T * k, K padded to 8], or in packed columns.

    `columns`: int32 [experts, padded columns], -1 for zeros. 16-bit elements.
    """
    width = x.shape[1]
    if in_order and columns is None and width % _ALIGNMENT == 0:
        return x
    padded = columns.shape[1] if columns is not None else width + -width % _ALIGNMENT
    y = x.new_empty(groups.num_pairs, padded)
    gather = _Gather(
        x.data_ptr(),
        groups.rows.data_ptr(),
        groups.owners.data_ptr(),
        0 if columns is None else columns.data_ptr(),
        groups.num_places.data_ptr(),
        y.data_ptr(),
        width,
        padded,
    )
    macros = {
        "HAS_COLUMNS": int(columns is not None),
        "HAS_ROWS": int(not in_order),
        "VECTOR": 8 if width % 8 == 0 else 1,
        "THREADS": _THREADS,
    }
    cuda_kernel("grouped_gather.cu", "grouped_gather", macros).launch(
        grid=(groups.num_pairs, -(-padded // (8 * _THREADS)), 1),
        block=(_THREADS, 1, 1),
        args=[gather],
        programmatic=True,
    )
    return y


def quantize_inputs(
    x: Tensor, groups: CudaTokenGroups, granularity: Granularity, given: Tensor | None, in_order: bool
) -> Float8Tokens:
    """As gather_inputs, in FP8 e4m3 codes: [T * k, K padded to 16] and scales [T * k], or [groups, line length].

    `given`: float32 [experts], for Granularity.GIVEN.
    """
    columns, pairs = x.shape[1], groups.num_pairs
    stride = columns + -columns % _CODE_ALIGNMENT
    codes = torch.empty(pairs, stride, dtype=torch.float8_e4m3fn, device=x.device)
    macros = quantize_macros(x.dtype, granularity, columns) | {"HAS_ROWS": int(not in_order)}
    blocks = 1
    shape: tuple[int, ...] = (pairs,)
    if granularity is Granularity.GROUP:
        lines = -(-columns // GROUP)
        blocks, shape = -(-lines * _GROUP_THREADS // int(macros["THREADS"])), (lines, groups.line_length)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    quantize = _Quantize(
        x.data_ptr(),
        groups.rows.data_ptr(),
        groups.owners.data_ptr(),
        groups.lines.data_ptr(),
        groups.num_places.data_ptr(),
        0 if given is None else given.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        columns,
        stride,
        groups.line_length,
    )
    cuda_kernel("grouped_quantize.cu", "grouped_quantize", macros).launch(
        grid=(pairs, blocks, 1),
        block=(int(macros["THREADS"]), 1, 1),
        args=[quantize],
        programmatic=True,
    )
    return Float8Tokens(codes, scales)
