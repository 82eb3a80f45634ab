"""The layers that the CUDA backend makes, of every kind of scheme, for a token and for a batch."""

from __future__ import annotations

from functools import partial

import torch

from aphroquant.kernels.benchmark.measure import error_of
from aphroquant.kernels.benchmark.scheme_names import scheme_of
from aphroquant.kernels.cuda.backend import fallback_reason, prepare
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import SelfTest

_TOLERANCE = 8e-3  # of results rounded to bf16, from weights that are rounded to bf16 before they are multiplied
_SCHEMES = (
    "bf16", "w4g128", "w4g32-asym", "w8", "w3g128-asym-act-order", "w2g64", "w8a8", "fp8", "fp8-block", "fp8-w8a16",
    "nf4", "fp4", "mxfp4", "nvfp4", "aqlm-2x8", "aqlm-1x16", "q3_k", "q4_k", "q6_k", "q8_0",
)  # fmt: skip
_TOKENS = (1, 40)
_OUT_FEATURES, _IN_FEATURES = 320, 1024


def layer_self_tests() -> list[SelfTest]:
    """One a scheme and number of tokens."""
    tests = []
    for name in _SCHEMES:
        slow = fallback_reason(scheme_of(name), torch.bfloat16)
        how = "dequantized for each product" if slow else "kernel"
        for tokens in _TOKENS:
            run = partial(_layer_error, name, tokens)
            tests.append(SelfTest(f"linear: {name}, {tokens} tokens, {how}", run, _TOLERANCE))
    return tests


def _layer_error(name: str, tokens: int) -> float:
    weight = random_weight(scheme_of(name), _OUT_FEATURES, _IN_FEATURES, "cuda")
    x = torch.randn(tokens, _IN_FEATURES, device="cuda").bfloat16()
    return error_of(prepare(weight, None, torch.bfloat16), weight, x)
