"""Layers of several experts with FP8 weights on Hopper GPUs: with FP8 activations, or with 16-bit ones as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.device import require
from aphroquant.kernels.cuda.float8.linear import unsupported
from aphroquant.kernels.cuda.float8.packing import pack_float8
from aphroquant.kernels.cuda.float8.quantize import Granularity
from aphroquant.kernels.cuda.grouped.inputs import quantize_inputs
from aphroquant.kernels.cuda.grouped.integer import GroupedIntegerProduct
from aphroquant.kernels.cuda.grouped.multiply import float8_multiply
from aphroquant.kernels.cuda.grouped.plans import Load, float8_tile
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups, sorted_on_gpu
from aphroquant.kernels.cuda.grouped.stacking import stack_biases, stack_packed
from aphroquant.kernels.reference.grouped import TokenGroups, check_experts, check_inputs
from aphroquant.schemes import FloatScheme, QuantizedWeight

_ALIGNMENT = 16  # bytes at which a row begins
_DTYPES = (torch.bfloat16, torch.float16)


class CudaGroupedFloat8Linear:
    """y[place] = W_e x[token] + b_e for bf16 or fp16 x. Sums are float32, in a fixed order.

    As CudaGroupedIntegerLinear, calls can be captured in CUDA graphs.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor] | None,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
    ) -> None:
        require()
        check_experts(weights, biases)
        scheme = weights[0].scheme
        if reason := unsupported(scheme):
            raise UsageError(reason)
        assert isinstance(scheme, FloatScheme)
        self.num_experts = len(weights)
        self.out_features, self.in_features = weights[0].shape
        self._scheme, self._inputs = scheme, scheme.activations
        self._bias = stack_biases(biases, device)
        if self._inputs is None:
            packed = stack_packed([pack_float8(weight, device) for weight in weights])
            self._product = GroupedIntegerProduct(packed, self._bias, dtype)
            return
        codes = torch.cat([weight["codes"].to(device).view(torch.uint8) for weight in weights])
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _ALIGNMENT))
        self._codes = padded.contiguous().view(torch.float8_e4m3fn)
        scales = torch.stack([weight["scales"].to(device, torch.float32) for weight in weights])
        if scheme.block_shape is None:  # [E] or [E, N, 1]
            scales = scales.view(self.num_experts, -1).expand(-1, self.out_features)
        self._scales = scales.contiguous()
        self._given = None
        if not self._inputs.dynamic:
            given = [weight["input_scale"].to(device, torch.float32).reshape(1) for weight in weights]
            self._given = torch.cat(given)

    @property
    def num_bytes(self) -> int:
        """Of the weights on the GPU."""
        if self._inputs is None:
            return self._product.packed.num_bytes
        return self._codes.numel() + 4 * self._scales.numel()

    def __call__(self, x: Tensor, groups: TokenGroups, *, in_order: bool = False) -> Tensor:
        """x [T, K], or with `in_order` [T * k, K] in the order of places -> [T * k, N] in that order."""
        check_inputs(x, groups, self.in_features, in_order)
        if x.dtype not in _DTYPES:
            raise UsageError(f"input is {x.dtype}, but must be bfloat16 or float16")
        groups = sorted_on_gpu(groups, self.num_experts)
        out = x.new_empty(groups.num_pairs, self.out_features)
        if out.numel():
            multiply = self._product.batch if self._inputs is None else self._multiply
            multiply(x.contiguous(), groups, out, in_order)
        return out

    def _multiply(self, x: Tensor, groups: CudaTokenGroups, out: Tensor, in_order: bool) -> None:
        blocks = self._scheme.block_shape
        granularity = Granularity.TOKEN if self._given is None else Granularity.GIVEN
        if blocks is not None:
            granularity = Granularity.GROUP
        tokens = quantize_inputs(x, groups, granularity, self._given, in_order)
        tile = float8_tile(self.in_features, Load(groups.num_pairs, groups.num_experts), blocks is not None)
        float8_multiply(
            self._codes,
            self._scales,
            tokens.codes,
            tokens.scales,
            groups,
            self._bias,
            tile,
            out,
            self.out_features,
            block_rows=None if blocks is None else blocks[0],
        )
