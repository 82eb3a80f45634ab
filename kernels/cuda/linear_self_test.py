"""Self-tests of linear layers on the GPU against float64, in milliseconds; each folder of kernels names its schemes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import SelfTest, relative_error
from aphroquant.schemes import QuantizedWeight, Scheme

_TOLERANCE = 4e-3  # rounding weights, or codebooks, and outputs to bf16
_OUT_FEATURES = 200

Layer = Callable[[QuantizedWeight, Tensor | None, torch.dtype], Callable[[Tensor], Tensor]]


def linear_self_tests(
    layer: Layer, schemes: Sequence[Scheme], tokens: Sequence[int], in_features: int = 512
) -> tuple[SelfTest, ...]:
    """One for every scheme and number of tokens."""
    return tuple(
        SelfTest(f"linear: {scheme}, {count} tokens", partial(_error, layer, scheme, count, in_features), _TOLERANCE)
        for scheme in schemes
        for count in tokens
    )


def _error(layer: Layer, scheme: Scheme, tokens: int, in_features: int) -> float:
    weight = random_weight(scheme, _OUT_FEATURES, in_features, "cuda")
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    found = layer(weight, None, torch.bfloat16)(x)
    return relative_error(found, x.double() @ weight.dequantize(torch.float64).T)
