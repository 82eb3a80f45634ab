"""The FP8 kernels on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch

from aphroquant.kernels.cuda.float8.linear import CudaFloat8Linear, unsupported
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.linear import quantize_dequantize
from aphroquant.kernels.self_test import relative_error
from aphroquant.schemes import ActivationScheme, FloatScheme

_TOLERANCE = 1e-2  # rounding outputs to bf16, and a few codes of inputs the other way
_GROUPS = ActivationScheme("float", granularity="group", group_size=128)
_SCHEMES = (
    FloatScheme("channel"),
    FloatScheme("channel", activations=ActivationScheme("float")),
    FloatScheme("block", (128, 128), activations=_GROUPS),
)
_TOKENS = (1, 600)


def _error(scheme: FloatScheme, tokens: int) -> float:
    weight = random_weight(scheme, 200, 512, "cuda")
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    inputs = x.float() if scheme.activations is None else quantize_dequantize(x.float(), scheme.activations)
    return relative_error(CudaFloat8Linear(weight, None)(x), inputs.double() @ weight.dequantize(torch.float64).T)


def self_tests() -> tuple[SelfTest, ...]:
    """Those that this GPU can run."""
    return tuple(
        SelfTest(f"linear: {scheme}, {tokens} tokens", partial(_error, scheme, tokens), _TOLERANCE)
        for scheme in _SCHEMES
        for tokens in _TOKENS
        if unsupported(scheme) is None
    )
