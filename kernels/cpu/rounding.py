"""Rounding to nearest from a weight's own range, in one pass.

`aphroquant/calibration/integer_grid.py` and `fp8.py` say in torch what is correct, to the last bit of codes, scales and
zero points. Errors are summed up more exactly here.
"""

from __future__ import annotations

from ctypes import byref
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.kernels.cpu.abi import FLOAT_TYPES, Float8RoundingStruct, RoundingStruct, address
from aphroquant.kernels.cpu.library import library, obstacle


class RoundedIntegers(NamedTuple):
    """`zeros` is None if symmetric. `error` and `total` are the sums of the squares of errors and of weights."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    error: float
    total: float


class RoundedFloats(NamedTuple):
    codes: Tensor  # uint8
    scales: Tensor
    error: float
    total: float


def usable(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> bool:
    """Whether the compiled functions can be called with such tensors."""
    ordinary = weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() > 0
    return ordinary and weight.dtype in FLOAT_TYPES and scale_dtype in FLOAT_TYPES and obstacle() is None


def round_integers(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype, *, symmetric: bool
) -> RoundedIntegers | None:
    """A finite weight [N, K] with a scale for `group_size` columns; None if a scale does not fit its dtype."""
    rows, columns = weight.shape
    grid = rows, ceil(columns / group_size)
    codes, scales = buffers.empty((rows, columns), torch.uint8), buffers.empty(grid, scale_dtype)
    zeros = None if symmetric else buffers.empty(grid, torch.uint8)
    job = RoundingStruct(
        weight=address(weight),
        rows=rows,
        columns=columns,
        group_size=group_size,
        weight_type=FLOAT_TYPES[weight.dtype],
        scale_type=FLOAT_TYPES[scale_dtype],
        bits=bits,
        symmetric=symmetric,
        codes=address(codes),
        scales=address(scales),
        zeros=address(zeros),
    )
    if library().aq_round_integers(byref(job)) != 0:
        return None
    return RoundedIntegers(codes, scales, zeros, job.error, job.total)


def round_float8(weight: Tensor, block: tuple[int, int], scale: Tensor | None = None) -> RoundedFloats:
    """A finite weight [N, K] as e4m3 with one float32 scale for each block of rows and columns: that of its largest
    number, or the one `scale` [] for all."""
    rows, columns = weight.shape
    codes = buffers.empty((rows, columns), torch.uint8)
    if scale is None:
        scales = torch.empty(ceil(rows / block[0]), ceil(columns / block[1]))
    else:
        scales, block = scale.reshape(1), (rows, columns)
    job = Float8RoundingStruct(
        weight=address(weight),
        rows=rows,
        columns=columns,
        block_rows=block[0],
        block_columns=block[1],
        weight_type=FLOAT_TYPES[weight.dtype],
        scales_given=scale is not None,
        codes=address(codes),
        scales=address(scales),
    )
    library().aq_round_float8(byref(job))
    return RoundedFloats(codes, scales if scale is None else scale, job.error, job.total)
