"""Tensor maps: descriptions of a tensor that the bulk copy engine of Hopper and newer GPUs reads tiles by."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from aphroquant.kernels.cuda.driver import check, driver

_TYPES = {  # CU_TENSOR_MAP_DATA_TYPE_...
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.uint16: 1,
    torch.uint32: 2,
    torch.int32: 3,
    torch.uint64: 4,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


class TensorMap(ctypes.Structure):
    """128 bytes that a kernel takes by value, as `const __grid_constant__ TensorMap`."""

    _fields_ = (("opaque", c_uint64 * 16),)
    alignment = 64  # of the kernel's parameter

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        box: Sequence[int],
        *,
        swizzle: Literal[0, 32, 64, 128] = 0,
        l2_promotion: Literal[0, 64, 128, 256] = 256,
        nan_fill: bool = False,
    ) -> TensorMap:
        """The map of a tensor with tiles of shape `box`; both outermost dimension first, as torch has them.

        The innermost dimension must be contiguous and the other strides multiples of 16 bytes; what a tile has beyond
        the tensor's edge reads as 0. The map holds the tensor's address: it is good as long as the tensor's storage is.
        """
        size = tensor.element_size()
        if not 1 <= tensor.dim() <= 5 or len(box) != tensor.dim():
            raise ValueError(
                f"a tensor map takes 1 to 5 dimensions and as many of the box, not {tensor.dim()} and {len(box)}"
            )
        if tensor.stride(-1) != 1:
            raise ValueError(f"the innermost dimension has stride {tensor.stride(-1)}, but must be contiguous")
        strides = [stride * size for stride in reversed(tensor.stride()[:-1])]
        rank = tensor.dim()
        encoded = cls()
        aligned = (ctypes.c_char * 192)()  # the driver wants the map at a multiple of 64
        address = ctypes.addressof(aligned) + -ctypes.addressof(aligned) % 64
        result = driver().cuTensorMapEncodeTiled(
            c_void_p(address),
            _TYPES[tensor.dtype],
            c_uint32(rank),
            c_void_p(tensor.data_ptr()),
            (c_uint64 * rank)(*reversed(tensor.shape)),
            (c_uint64 * max(1, rank - 1))(*strides),
            (c_uint32 * rank)(*reversed(box)),
            (c_uint32 * rank)(*[1] * rank),
            0,  # not interleaved
            _SWIZZLES[swizzle],
            _L2_PROMOTIONS[l2_promotion],
            int(nan_fill),
        )
        what = f"the tensor map of {tensor.dtype} {list(tensor.shape)} in tiles of {list(box)}, swizzle {swizzle},"
        check(result, what)
        ctypes.memmove(ctypes.addressof(encoded), address, 128)
        return encoded
