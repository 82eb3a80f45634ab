"""The integer kernels on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch

from aphroquant.kernels.cuda.integer.linear import CudaIntegerLinear
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import relative_error
from aphroquant.schemes import IntegerScheme

_TOLERANCE = 4e-3  # rounding weights and outputs to bf16
_SCHEMES = (IntegerScheme(4, 128, True), IntegerScheme(4, 32, False, act_order=True), IntegerScheme(8, None, True))
_TOKENS = (1, 40, 600)  # for decoding, batches, prompts


def _error(scheme: IntegerScheme, tokens: int) -> float:
    weight = random_weight(scheme, 200, 512, "cuda")
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    found = CudaIntegerLinear(weight, None, torch.bfloat16)(x)
    return relative_error(found, x.double() @ weight.dequantize(torch.float64).T)


SELF_TESTS = tuple(
    SelfTest(f"linear: {scheme}, {tokens} tokens", partial(_error, scheme, tokens), _TOLERANCE)
    for scheme in _SCHEMES
    for tokens in _TOKENS
)
