"""The kernels for lookup weights and super-blocks on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch

from aphroquant.kernels.cuda.lookup.linear import CudaLookupLinear
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import relative_error
from aphroquant.schemes import KQuantScheme, LookupScheme, Scheme

_TOLERANCE = 4e-3  # rounding weights and outputs to bf16
_SCHEMES: tuple[Scheme, ...] = (
    LookupScheme("nf4", 64, "nested", flattened=True),
    LookupScheme("fp4", 64, "float"),
    LookupScheme("e2m1", 32, "e8m0"),
    LookupScheme("e2m1", 16, "e4m3"),
    KQuantScheme("q4_k"),
    KQuantScheme("q6_k"),
)
_TOKENS = (1, 40, 600)  # for decoding, batches, prompts


def _error(scheme: Scheme, tokens: int) -> float:
    weight = random_weight(scheme, 200, 512, "cuda")
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    found = CudaLookupLinear(weight, None, torch.bfloat16)(x)
    return relative_error(found, x.double() @ weight.dequantize(torch.float64).T)


SELF_TESTS = tuple(
    SelfTest(f"linear: {scheme}, {tokens} tokens", partial(_error, scheme, tokens), _TOLERANCE)
    for scheme in _SCHEMES
    for tokens in _TOKENS
)
