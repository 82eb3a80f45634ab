"""Products of packed weights with more tokens than the decode kernel takes: batches and prompts."""

from __future__ import annotations

from ctypes import c_int32

import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.mma import mma_multiply
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.integer.problem import scale_exponent
from aphroquant.kernels.cuda.integer.row_parts import Part, multiply_parts, row_parts
from aphroquant.kernels.cuda.integer.tiles import choose_mma_tile, choose_wgmma_tile, with_fewer_stages
from aphroquant.kernels.cuda.launcher import cuda_kernel

_ALIGNMENT = 8  # 16-bit inputs: rows begin at multiples of 16 bytes
_THREADS = 256


class BatchLinear:
    """y = x @ W.T + bias for bf16 or fp16 x. `bias` is float32. Sums are float32, in a fixed order."""

    def __init__(self, packed: PackedInteger, bias: Tensor | None) -> None:
        self.packed, self.bias = packed, bias
        self._parts: dict[int, list[Part]] = {}
        self._exponents = {dtype: scale_exponent(packed, dtype) for dtype in (torch.bfloat16, torch.float16)}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N], in x's dtype. T may not be 0."""
        packed = self.packed
        if packed.columns is not None:
            x = gather_columns(x, packed.columns)
        elif packed.in_features % _ALIGNMENT:
            x = torch.nn.functional.pad(x, (0, -packed.in_features % _ALIGNMENT))
        x = x.contiguous()
        device = gpu(x.get_device())
        if out is None:
            out = x.new_empty(x.shape[0], packed.out_features)
        exponent = self._exponents[x.dtype]
        if device.capability == (9, 0):
            return multiply_parts(packed, x, self.bias, self._wgmma_parts(x), exponent, out)
        mma = choose_mma_tile(packed, x.shape[0], device.multiprocessors)
        return mma_multiply(packed, x, self.bias, mma, exponent, out)

    def _wgmma_parts(self, x: Tensor) -> list[Part]:
        tokens = x.shape[0]
        if tokens not in self._parts:
            packed, device = self.packed, x.get_device()
            tile = choose_wgmma_tile(packed, tokens, device)
            size = (packed.out_features, packed.padded_columns, tokens)
            parts = row_parts(*size, tile, gpu(device).multiprocessors)
            self._parts[tokens] = [(rows, with_fewer_stages(own, packed) or own) for rows, own in parts]
        return self._parts[tokens]


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x [T, K] in packed order: [T, padded columns], 0 where `columns` is negative. 16-bit elements."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], columns.shape[0])
    cuda_kernel("gather_columns.cu", "gather_columns", {"THREADS": _THREADS}).launch(
        grid=(x.shape[0], -(-columns.shape[0] // (2 * _THREADS)), 1),
        block=(_THREADS, 1, 1),
        args=[x, columns, y, c_int32(x.shape[1]), c_int32(columns.shape[0])],
        programmatic=True,
    )
    return y
