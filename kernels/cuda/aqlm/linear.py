"""Linear layers with AQLM weights on a GPU: packed once, multiplied by the kernel that is fastest for the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.aqlm.dequantize import dequantize_multiply
from aphroquant.kernels.cuda.aqlm.gather import gather_multiply
from aphroquant.kernels.cuda.aqlm.lookup import TABLE_BYTES, LookupLinear, has_tables
from aphroquant.kernels.cuda.aqlm.packing import CodeLayout, pack_additive
from aphroquant.kernels.cuda.aqlm.plans import (
    LOOKUP,
    SLICED,
    Layer,
    dequantize_plan,
    gather_plan,
    gathers,
    lookup_plan,
    runs_one_by_one,
    shared_limit,
    sliced_plan,
    tiles_for,
)
from aphroquant.kernels.cuda.aqlm.sliced import SLICED_BYTES, SlicedLinear, can_be_sliced
from aphroquant.kernels.cuda.device import gpu
from aphroquant.schemes import AdditiveScheme, QuantizedWeight, Scheme

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes
_MAX_CODE_BITS = 24
_MAX_IN_GROUP = 32


def unsupported(scheme: Scheme) -> str | None:
    """Why these kernels cannot run a layer of that scheme, or None."""
    if not isinstance(scheme, AdditiveScheme):
        return f"{scheme} is no sum of codebooks"
    if scheme.out_group != 1:
        return f"the AQLM kernels take groups of one output, not {scheme.out_group}"
    if scheme.in_group % 4 or scheme.in_group > _MAX_IN_GROUP:
        return f"the AQLM kernels take groups of 4, 8, .. {_MAX_IN_GROUP} inputs, not {scheme.in_group}"
    if scheme.code_bits > _MAX_CODE_BITS:
        return f"the AQLM kernels take codes of up to {_MAX_CODE_BITS} bits, not {scheme.code_bits}"
    if not CodeLayout.of(scheme).groups:
        return f"the AQLM kernels take fewer than {scheme.num_codebooks} codebooks"
    return None


class CudaAdditiveLinear:
    """y = x @ W.T + bias for x and y of `dtype` (bfloat16 or float16) on one GPU.

    Sums are float32, in a fixed order: the same input gives the same bits. Codebooks are rounded to `dtype`, except
    where tables are made of them.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cuda"
    ) -> None:
        if reason := unsupported(weight.scheme):
            raise UsageError(reason)
        if dtype not in _DTYPES:
            raise UsageError(f"dtype = {dtype} must be torch.bfloat16 or torch.float16 for the CUDA kernels")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise UsageError(f"bias has shape {list(bias.shape)}, but the layer has {weight.shape[0]} outputs")
        assert isinstance(weight.scheme, AdditiveScheme)
        self.dtype = dtype
        self.out_features, self.in_features = weight.shape
        self.packed = pack_additive(weight, dtype, device)
        self.bias = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        self._layer = Layer(weight.scheme, *weight.shape, self.packed.codes.get_device())
        self._one_token = self._kernel_for_one(weight)

    @property
    def num_bytes(self) -> int:
        """Of the packed weight on the GPU."""
        sliced = self._one_token.codes.num_bytes if isinstance(self._one_token, SlicedLinear) else 0
        return self.packed.num_bytes + sliced

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != self.dtype:
            found = f"{x.dtype} {list(x.shape)}"
            raise UsageError(f"input is {found}, but must be {self.dtype} [rows, {self.in_features}]")
        if x.device != self.packed.codes.device:
            raise UsageError(f"input is on {x.device}, but the weight is on {self.packed.codes.device}")
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        if x.shape[0] and self.out_features:
            if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
                x = x.clone(memory_format=torch.contiguous_format)
            self._multiply(x, out)
        return out

    def _kernel_for_one(self, weight: QuantizedWeight) -> LookupLinear | SlicedLinear | None:
        """The kernel for one token, if there is one that is faster than that for a few."""
        capability = gpu(self._layer.device).capability
        limit, scheme = shared_limit(capability), self._layer.scheme
        if has_tables(scheme) and limit > TABLE_BYTES:
            return LookupLinear(self.packed, self.bias, self.dtype)
        if can_be_sliced(scheme) and capability >= (9, 0) and limit > SLICED_BYTES and self.out_features:
            return SlicedLinear(self.packed, weight["codes"].to(self.packed.codes.device), self.bias)
        return None

    def _multiply(self, x: Tensor, out: Tensor) -> None:
        tokens, layer = x.shape[0], self._layer
        if self._runs_one_by_one(tokens):
            for token in range(tokens):
                self._multiply_one(x[token : token + 1], out[token : token + 1])
            return
        multiprocessors = gpu(layer.device).multiprocessors
        if gathers(layer, tokens):
            tiles = tiles_for(tokens)
            gather = gather_plan(layer, tokens)
            gather_multiply(self.packed, x, self.bias, out, tiles, gather, multiprocessors * gather.blocks)
            return
        dequantize_multiply(self.packed, x, self.bias, out, dequantize_plan(layer, tokens), multiprocessors)

    def _runs_one_by_one(self, tokens: int) -> bool:
        if self._one_token is None:
            return False
        table = LOOKUP if isinstance(self._one_token, LookupLinear) else SLICED
        return runs_one_by_one(self._layer, tokens, table)

    def _multiply_one(self, x: Tensor, out: Tensor) -> None:
        if isinstance(self._one_token, LookupLinear):
            self._one_token(x, out, lookup_plan(self._layer, self.packed.codes.shape[0]))
        elif isinstance(self._one_token, SlicedLinear):
            self._one_token(x, out, sliced_plan(self._layer, self._one_token.units))
