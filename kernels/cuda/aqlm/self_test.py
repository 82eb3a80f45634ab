"""The AQLM kernels on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch

from aphroquant.kernels.cuda.aqlm.linear import CudaAdditiveLinear
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import relative_error
from aphroquant.schemes import AdditiveScheme

_TOLERANCE = 4e-3  # rounding codebooks and outputs to bf16
_SCHEMES = (AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(3, 6, in_group=4))
_TOKENS = (1, 5, 40, 600)  # tables or entries for decoding, entries for batches, dense rows for prompts


def _error(scheme: AdditiveScheme, tokens: int) -> float:
    weight = random_weight(scheme, 200, 1040, "cuda")
    x = torch.randn(tokens, 1040, device="cuda", dtype=torch.bfloat16)
    found = CudaAdditiveLinear(weight, None, torch.bfloat16)(x)
    return relative_error(found, x.double() @ weight.dequantize(torch.float64).T)


SELF_TESTS = tuple(
    SelfTest(f"linear: {scheme}, {tokens} tokens", partial(_error, scheme, tokens), _TOLERANCE)
    for scheme in _SCHEMES
    for tokens in _TOKENS
)
