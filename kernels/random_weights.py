"""Random weights of any scheme, for checking and timing kernels: of realistic size, and never zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphroquant.schemes import AffineScheme, DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

DEVIATION = 0.02  # of a weight, as in the models whose layers are timed


def random_weight(scheme: Scheme, out_features: int, in_features: int, device: str = "cpu") -> QuantizedWeight:
    """A weight [N, K] with codes that take every value, and scales that make its numbers about 0.02."""
    if isinstance(scheme, DenseScheme):
        weight = torch.randn(out_features, in_features, device=device).mul_(DEVIATION).to(scheme.dtype)
        return QuantizedWeight.dense(weight)
    shapes = scheme.shapes(out_features, in_features)
    tensors = {name: _tensor(scheme, name, shape, device) for name, shape in shapes.items()}
    if isinstance(scheme, IntegerScheme) and scheme.act_order:
        size = scheme.group_size or in_features
        tensors["group_index"] = torch.randperm(in_features, device=device).to(torch.int32) // size
    activations = getattr(scheme, "activations", None)
    if activations is not None and not activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.05, device=device)
    return QuantizedWeight(scheme, tensors, (out_features, in_features))


def _tensor(scheme: Scheme, name: str, shape: tuple[int, ...], device: str) -> Tensor:
    if isinstance(scheme, FloatScheme) and name == "codes":
        return torch.randn(shape, device=device).to(scheme.dtype)
    dtype = scheme.dtypes().get(name)
    bits = scheme.storage_bits(name) or 8
    if name in ("codes", "zeros") and dtype is None:
        dtype = torch.uint8
    if isinstance(scheme, AffineScheme) and name == "zeros":
        return torch.rand(shape, device=device).mul_(2**scheme.bits)
    if name == "codebooks":
        return torch.randn(shape, device=device).half()
    if dtype is not None and dtype.itemsize == 1 and dtype.is_floating_point:
        # Block scales: powers of two, or numbers under a global one.
        if dtype == torch.float8_e8m0fnu:
            return torch.randint(118, 122, shape, dtype=torch.uint8, device=device).view(dtype)
        return torch.rand(shape, device=device).add_(0.5).to(dtype)
    if dtype == torch.int32 and name != "codes":  # words, of which every bit counts
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device).to(torch.int32)
    if dtype is not None and not dtype.is_floating_point:
        low, high = (-32, 32) if dtype == torch.int8 else (0, 2**bits)
        return torch.randint(low, high, shape, dtype=dtype, device=device)
    size = DEVIATION / _code_size(scheme)
    scales = size * (0.75 + 0.5 * torch.rand(shape, device=device))
    return scales.half() if dtype in (None, torch.float16) and math.prod(shape) > 1 else scales


def _code_size(scheme: Scheme) -> float:
    """About how large a number is before it is scaled."""
    return max(1.0, 2**scheme.bits / 3.5) if isinstance(scheme, IntegerScheme | AffineScheme) else 1.0
