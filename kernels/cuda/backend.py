"""The CUDA backend: which layer runs a scheme. The choice is by what the numbers are, never by their file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.kernels.dispatch import PreparedLinear
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

PACKAGE = "aphroquant.kernels.cuda"


class LayerModule(NamedTuple):
    """A module with a layer class, and a function `unsupported(scheme)` that tells why it cannot run one."""

    module: str
    layer: str


LAYERS: dict[type, LayerModule] = {
    IntegerScheme: LayerModule("integer.linear", "CudaIntegerLinear"),
    FloatScheme: LayerModule("float8.linear", "CudaFloat8Linear"),
}


@dataclass(frozen=True)
class CudaBackend:
    """Layers on torch's current GPU."""

    reason: str
    dtype: torch.dtype = torch.bfloat16  # of inputs and results
    name: str = "cuda"

    def prepare(self, weight: QuantizedWeight, bias: Tensor | None) -> PreparedLinear:
        from aphroquant.kernels.cuda.operator import RegisteredLinear

        return RegisteredLinear(prepare(weight, bias, self.dtype))


def prepare(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PreparedLinear:
    """The layer in the layout of its kernel, on torch's current GPU, for inputs of that dtype."""
    from aphroquant.kernels.cuda.dequantizing import DenseLinear, DequantizingLinear

    device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(weight.scheme, DenseScheme):
        return DenseLinear(weight, bias, device)
    if fallback_reason(weight.scheme):
        return DequantizingLinear(weight, bias, device)
    module, name = LAYERS[type(weight.scheme)]
    layer: PreparedLinear = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)(weight, bias, dtype, device)
    return layer


def fallback_reason(scheme: Scheme) -> str | None:
    """Why a layer of that scheme is dequantized for every product, or None where a kernel runs it."""
    if isinstance(scheme, DenseScheme):
        return None
    if type(scheme) not in LAYERS:
        return f"there is no CUDA kernel for {scheme}"
    reason: str | None = importlib.import_module(f"{PACKAGE}.{LAYERS[type(scheme)].module}").unsupported(scheme)
    return reason
