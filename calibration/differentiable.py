"""Products that gradients pass through, by the fastest routine of the device (see kernels/reference/matmul.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aphroquant.kernels.reference import matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N], differentiable by all three."""
    if x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        by_input = matmul.linear(gradient, weight.T) if ctx.needs_input_grad[0] else None
        by_weight = matmul.linear(gradient.T, x.T) if ctx.needs_input_grad[1] else None
        return by_input, by_weight


@contextmanager
def repeatable_training(device: torch.device) -> Iterator[None]:
    """On a GPU: products in TF32, and attention by a routine whose gradients are the same bits each time."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
