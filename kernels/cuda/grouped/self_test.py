"""The grouped kernels on the GPU against float64, in milliseconds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.measure import experts_error
from aphroquant.kernels.cuda.backend import prepare_grouped
from aphroquant.kernels.cuda.float8.linear import unsupported
from aphroquant.kernels.cuda.grouped.routing import combine, group_tokens
from aphroquant.kernels.cuda.self_test import SelfTest
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.self_test import relative_error
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme

_INTEGER_TOLERANCE = 4e-3  # rounding weights and outputs to bf16
_FLOAT8_TOLERANCE = 1e-2  # and a few codes of inputs the other way
_EXPERTS, _TOP_K = 12, 3
_TOKENS = (2, 200)  # for decoding, for prompts
_GROUPS = ActivationScheme("float", granularity="group", group_size=128)
_INTEGERS = (IntegerScheme(4, 128, True), IntegerScheme(4, 32, False, act_order=True), IntegerScheme(8, None, True))
_FLOATS = (
    FloatScheme("channel", activations=ActivationScheme("float")),
    FloatScheme("block", (128, 128), activations=_GROUPS),
)


def _experts(tokens: int) -> Tensor:
    return torch.rand(tokens, _EXPERTS, device="cuda").topk(_TOP_K).indices


def _product_error(scheme: IntegerScheme | FloatScheme, tokens: int) -> float:
    weights = [random_weight(scheme, 200, 512, "cuda") for _ in range(_EXPERTS)]
    groups = group_tokens(_experts(tokens), _EXPERTS)
    x = torch.randn(tokens, 512, device="cuda").bfloat16()
    layer = prepare_grouped(weights, None, torch.bfloat16)
    return experts_error(layer(x, groups), weights, x, groups, by_token=True)


def _combine_error() -> float:
    """Of tokens that are sorted by expert, and added up again."""
    ids, weights = _experts(300), torch.rand(300, _TOP_K, device="cuda")
    groups, x = group_tokens(ids, _EXPERTS), torch.randn(300, 64, device="cuda").half()
    found = combine(x[groups.rows.long()], groups, weights)
    return relative_error(found, x.double() * weights.double().sum(1, keepdim=True))


def self_tests() -> tuple[SelfTest, ...]:
    """Those that this GPU can run."""
    schemes: list[tuple[IntegerScheme | FloatScheme, float]] = [(scheme, _INTEGER_TOLERANCE) for scheme in _INTEGERS]
    schemes += [(scheme, _FLOAT8_TOLERANCE) for scheme in _FLOATS if unsupported(scheme) is None]
    products = [
        SelfTest(f"experts: {scheme}, {tokens} tokens", partial(_product_error, scheme, tokens), tolerance)
        for scheme, tolerance in schemes
        for tokens in _TOKENS
    ]
    return (SelfTest("experts: sorting and adding up", _combine_error, 1e-3), *products)
