"""Layers of several experts with integer weights on a GPU: one launch for all experts and any spread of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.grouped.inputs import gather_inputs
from aphroquant.kernels.cuda.grouped.multiply import decode_multiply, mma_multiply, wgmma_multiply
from aphroquant.kernels.cuda.grouped.plans import DECODE_SIZES, Load, decode_plan, mma_tile, wgmma_tile
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups, sorted_on_gpu
from aphroquant.kernels.cuda.grouped.stacking import stack_biases, stack_integers
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan, DecodeShape
from aphroquant.kernels.cuda.integer.linear import DTYPES
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.integer.problem import scale_exponent
from aphroquant.kernels.reference.grouped import TokenGroups, check_experts, check_inputs
from aphroquant.schemes import QuantizedWeight

_SHARED_BYTES = {(8, 0): 164 << 10, (8, 7): 164 << 10, (9, 0): 228 << 10, (10, 0): 228 << 10}  # of a multiprocessor
_OTHER_SHARED_BYTES = 100 << 10


class CudaGroupedIntegerLinear:
    """y[place] = W_e x[token] + b_e for x and y of `dtype` (bfloat16 or float16) on one GPU.

    Sums are float32, in a fixed order. How many tokens an expert has is read on the GPU alone: a call can be captured
    in a CUDA graph and replayed with other experts. The weights of experts without tokens are not read.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor] | None,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype = {dtype} must be torch.bfloat16 or torch.float16 for the CUDA kernels")
        check_experts(weights, biases)
        self.dtype, self.num_experts = dtype, len(weights)
        self.out_features, self.in_features = weights[0].shape
        self.product = GroupedIntegerProduct(stack_integers(weights, device), stack_biases(biases, device), dtype)

    @property
    def num_bytes(self) -> int:
        """Of the packed weights on the GPU."""
        return self.product.packed.num_bytes

    def __call__(self, x: Tensor, groups: TokenGroups, *, in_order: bool = False) -> Tensor:
        """x [T, K], or with `in_order` [T * k, K] in the order of places -> [T * k, N] in that order."""
        check_inputs(x, groups, self.in_features, in_order)
        if x.dtype != self.dtype:
            raise UsageError(f"input is {x.dtype}, but must be {self.dtype}")
        groups = sorted_on_gpu(groups, self.num_experts)
        out = x.new_empty(groups.num_pairs, self.out_features)
        if out.numel():
            self.product(x.contiguous(), groups, out, in_order)
        return out


class GroupedIntegerProduct:
    """The product with a stacked weight, by the kernel that suits the number of pairs."""

    def __init__(self, packed: PackedInteger, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.packed, self.bias = packed, bias
        self._shape = DecodeShape.of(packed, dtype, bias is not None)
        self._exponent = scale_exponent(packed, dtype)
        self._plans: dict[tuple[int, bool], DecodePlan] = {}

    def __call__(self, x: Tensor, groups: CudaTokenGroups, out: Tensor, in_order: bool) -> None:
        load = Load(groups.num_pairs, groups.num_experts)
        plan = self.plan(load, x.get_device()) if load.few else None
        if plan is not None and (plan.blocks_per_multiprocessor > 1 or load.of_expert <= 1):
            self.decode(x, groups, out, in_order, load.size(DECODE_SIZES), plan)
        else:
            self.batch(x, groups, out, in_order)

    def plan(self, load: Load, device: int) -> DecodePlan:
        """Of the decode kernel."""
        found, size = gpu(device), load.size(DECODE_SIZES)
        few_blocks = load.few_blocks(self._shape.super_rows, found.multiprocessors)
        key = (size, few_blocks)
        if key not in self._plans:
            limit = _SHARED_BYTES.get(found.capability, _OTHER_SHARED_BYTES)
            self._plans[key] = decode_plan(self._shape, size, limit, few_blocks)
        return self._plans[key]

    def batch(self, x: Tensor, groups: CudaTokenGroups, out: Tensor, in_order: bool) -> None:
        """By the kernels for many tokens."""
        load = Load(groups.num_pairs, groups.num_experts)
        inputs = gather_inputs(x, groups, self.packed.columns, in_order)
        if gpu(x.get_device()).capability == (9, 0):
            tile = wgmma_tile(self.packed, load)
            wgmma_multiply(self.packed, inputs, groups, self.bias, tile, self._exponent, out)
        else:
            mma_multiply(self.packed, inputs, groups, self.bias, mma_tile(load), self._exponent, out)

    def decode(
        self, x: Tensor, groups: CudaTokenGroups, out: Tensor, in_order: bool, size: int, plan: DecodePlan
    ) -> None:
        """By the decode kernel, on tiles of `size` tokens."""
        if x.data_ptr() % 16:
            x = x.clone()
        decode_multiply(self.packed, x, groups, self.bias, plan, size, out, in_order)
