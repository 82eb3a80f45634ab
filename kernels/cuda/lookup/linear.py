"""Linear layers whose codes stand for a table's numbers (NF4, FP4, MXFP4, NVFP4, IQ4_NL), and GGUF's super-blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.kernels.cuda.integer.linear import PackedLinear
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.lookup.packing import group_columns, pack_lookup
from aphroquant.kernels.cuda.lookup.super_blocks import pack_super_blocks
from aphroquant.schemes import KQuantScheme, LookupScheme, QuantizedWeight, Scheme


def unsupported(scheme: Scheme, in_features: int | None = None) -> str | None:
    """Why these kernels cannot run a layer of that scheme, with so many inputs if that is known, or None."""
    if isinstance(scheme, KQuantScheme):
        return None
    if not isinstance(scheme, LookupScheme):
        return f"{scheme} has no table"
    if scheme.activations is not None:
        return f"there is no CUDA kernel for quantized inputs of {scheme}"
    if in_features is not None and group_columns(scheme, in_features) is None:
        return f"blocks of {scheme} cross rows of {in_features} columns"
    return None


class CudaLookupLinear(PackedLinear):
    """y = x @ W.T + bias for x and y of `dtype` (bfloat16 or float16) on one GPU.

    W is not rounded but for a table's numbers, once (tables.py); for batches also each product of number and scale,
    where the type of the inputs does not hold it (it does for FP4 formats with e8m0 and e4m3 scales).
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cuda"
    ) -> None:
        super().__init__(pack_any(weight, device), bias, dtype)


def pack_any(weight: QuantizedWeight, device: torch.device | str) -> PackedInteger:
    """The weight of any scheme that these kernels run, on `device`."""
    if isinstance(weight.scheme, KQuantScheme):
        return pack_super_blocks(weight, device)
    return pack_lookup(weight, device)
