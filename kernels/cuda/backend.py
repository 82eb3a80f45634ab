"""The CUDA backend: which layer runs a scheme. The choice is by what the numbers are, never by their file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.dispatch import PreparedGroupedLinear, PreparedLinear, prepare_one_by_one
from aphroquant.schemes import (
    AdditiveScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)


@dataclass(frozen=True)
class CudaBackend:
    """Layers on torch's current GPU."""

    reason: str
    dtype: torch.dtype = torch.bfloat16  # of inputs and results
    name: str = "cuda"

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> PreparedLinear:
        from aphroquant.kernels.cuda.operator import RegisteredLinear

        return RegisteredLinear(prepare(weight, bias, self.dtype))

    def prepare_grouped(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None
    ) -> PreparedGroupedLinear:
        if grouped_fallback_reason(weights, self.dtype):
            return prepare_one_by_one(self, weights, biases)
        return prepare_grouped(weights, biases, self.dtype)


def prepare_grouped(
    weights: Sequence[QuantizedWeight], biases: Sequence[Tensor] | None, dtype: torch.dtype
) -> PreparedGroupedLinear:
    """The experts' layers in one layout, on torch's current GPU, where there is a kernel for them."""
    device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(weights[0].scheme, DenseScheme):
        from aphroquant.kernels.cuda.grouped.dense import CudaGroupedDenseLinear

        return CudaGroupedDenseLinear(weights, biases, device)
    if isinstance(weights[0].scheme, IntegerScheme):
        from aphroquant.kernels.cuda.grouped.integer import CudaGroupedIntegerLinear

        return CudaGroupedIntegerLinear(weights, biases, dtype, device)
    from aphroquant.kernels.cuda.grouped.float8 import CudaGroupedFloat8Linear

    return CudaGroupedFloat8Linear(weights, biases, dtype, device)


def grouped_fallback_reason(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> str | None:
    """Why such experts run one after another, their numbers of tokens read on the host; None if they do not."""
    from aphroquant.kernels.cuda.grouped.routing import MAX_EXPERTS

    scheme = weights[0].scheme
    if not isinstance(scheme, IntegerScheme | FloatScheme | DenseScheme):
        return f"there is no grouped CUDA kernel for {scheme}"
    if len(weights) > MAX_EXPERTS:
        return f"{len(weights)} experts are more than the {MAX_EXPERTS} that the grouped CUDA kernels take"
    if isinstance(scheme, DenseScheme):
        from aphroquant.kernels.cuda.grouped.dense import unsupported

        return unsupported(weights, dtype)
    return fallback_reason(scheme, dtype)


def prepare(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PreparedLinear:
    """The layer in the layout of its kernel, on torch's current GPU, for inputs of that dtype."""
    device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(weight.scheme, DenseScheme):
        from aphroquant.kernels.cuda.dequantizing import DenseLinear

        return DenseLinear(weight, bias, device)
    if fallback_reason(weight.scheme, dtype, weight.shape[1]):
        from aphroquant.kernels.cuda.dequantizing import DequantizingLinear

        return DequantizingLinear(weight, bias, device)
    if isinstance(weight.scheme, IntegerScheme):
        from aphroquant.kernels.cuda.integer.linear import CudaIntegerLinear

        return CudaIntegerLinear(weight, bias, dtype, device)
    if isinstance(weight.scheme, LookupScheme | KQuantScheme):
        from aphroquant.kernels.cuda.lookup.linear import CudaLookupLinear

        return CudaLookupLinear(weight, bias, dtype, device)
    if isinstance(weight.scheme, AdditiveScheme):
        from aphroquant.kernels.cuda.aqlm.linear import CudaAdditiveLinear

        return CudaAdditiveLinear(weight, bias, dtype, device)
    from aphroquant.kernels.cuda.float8.linear import CudaFloat8Linear

    return CudaFloat8Linear(weight, bias, device)


def fallback_reason(scheme: Scheme, dtype: torch.dtype, in_features: int | None = None) -> str | None:
    """Why a layer of that scheme is dequantized for every product, or None where a kernel or torch itself runs it.

    Some schemes run for some numbers of inputs only: ask with `in_features` about a layer.
    """
    if isinstance(scheme, DenseScheme):
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels take bfloat16 and float16 inputs, not {str(dtype).removeprefix('torch.')}"
    if isinstance(scheme, IntegerScheme):
        return None if scheme.activations is None else f"there is no CUDA kernel for quantized inputs of {scheme}"
    if isinstance(scheme, FloatScheme):
        from aphroquant.kernels.cuda.float8.linear import unsupported

        return unsupported(scheme)
    if isinstance(scheme, LookupScheme | KQuantScheme):
        from aphroquant.kernels.cuda.lookup import linear

        return linear.unsupported(scheme, in_features)
    if isinstance(scheme, AdditiveScheme):
        from aphroquant.kernels.cuda.aqlm.linear import unsupported as additive_obstacle

        return additive_obstacle(scheme)
    return f"there is no CUDA kernel for {scheme}"
