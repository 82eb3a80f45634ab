"""Linear layers with integer weights on a GPU: packed once, multiplied by the kernel that is fastest for the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.integer.batch import BatchLinear
from aphroquant.kernels.cuda.integer.crossover import batch_is_faster
from aphroquant.kernels.cuda.integer.decode import DecodeLinear
from aphroquant.kernels.cuda.integer.measured import kind_of_lookup
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack
from aphroquant.schemes import QuantizedWeight

DTYPES = (torch.bfloat16, torch.float16)


class PackedLinear:
    """y = x @ W.T + bias for a packed W, and x and y of `dtype` (bfloat16 or float16) on one GPU.

    Sums are float32, in a fixed order: the same input gives the same bits. A call allocates its output and, for
    batches, what torch's allocator keeps in a graph's pool: calls can be captured in CUDA graphs once each number of
    tokens has been run.
    """

    def __init__(self, packed: PackedInteger, bias: Tensor | None, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype = {dtype} must be torch.bfloat16 or torch.float16 for the CUDA kernels")
        if bias is not None and tuple(bias.shape) != (packed.out_features,):
            raise UsageError(f"bias has shape {list(bias.shape)}, but the layer has {packed.out_features} outputs")
        self.dtype = dtype
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.packed = packed
        self._size, self._lookup = (packed.out_features, packed.in_features), kind_of_lookup(packed)
        self.bias = None if bias is None else bias.detach().to(packed.codes.device, torch.float32).contiguous()
        self._decode = DecodeLinear(self.packed, self.bias, dtype)
        self._batch = BatchLinear(self.packed, self.bias)

    @property
    def num_bytes(self) -> int:
        """Of the packed weight on the GPU."""
        return self.packed.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != self.dtype:
            found = f"{x.dtype} {list(x.shape)}"
            raise UsageError(f"input is {found}, but must be {self.dtype} [rows, {self.in_features}]")
        if x.device != self.packed.codes.device:
            raise UsageError(f"input is on {x.device}, but the weight is on {self.packed.codes.device}")
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        if batch_is_faster(self.packed.bits, *self._size, x.shape[0], x.get_device(), self._lookup):
            self._batch(x, out)
        elif x.shape[0] > 0:
            self._decode(x, out)
        return out


class CudaIntegerLinear(PackedLinear):
    """A layer with an integer weight."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cuda"
    ) -> None:
        super().__init__(pack(weight, device), bias, dtype)
