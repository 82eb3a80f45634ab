"""Layers of several experts on a GPU, as they are used: any routing, odd shapes, graphs, broken inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.benchmark.measure import experts_error
from aphroquant.kernels.cuda.backend import CudaBackend, grouped_fallback_reason
from aphroquant.kernels.cuda.device import obstacle
from aphroquant.kernels.cuda.grouped.integer import CudaGroupedIntegerLinear
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups, combine, group_tokens
from aphroquant.kernels.dispatch import PreparedGroupedLinear
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference import grouped as reference
from aphroquant.schemes import ActivationScheme, FloatScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

pytestmark = pytest.mark.gpu
# Relative error in the norm: what rounding weights and outputs does, and no more.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 6e-4}
FLOAT8_TOLERANCE = 8e-3  # a code that is rounded the other way is 6 % off; these are few
GROUPS = ActivationScheme("float", granularity="group", group_size=128)
SCHEMES: dict[str, Scheme] = {
    "4 bits": IntegerScheme(4, 128, True),
    "4 bits, zeros, groups of 32": IntegerScheme(4, 32, False),
    "4 bits, groups of 64, offsets": IntegerScheme(4, 64, False, has_offsets=True),
    "4 bits, act-order": IntegerScheme(4, 64, False, act_order=True),
    "4 bits, channel, zeros": IntegerScheme(4, None, False),
    "8 bits, groups of 32": IntegerScheme(8, 32, True),
    "8 bits, channel": IntegerScheme(8, None, True),
    "3 bits": IntegerScheme(3, 64, False),
    "2 bits": IntegerScheme(2, 128, False),
    "FP8, weights only": FloatScheme("channel"),
    "FP8, tensor": FloatScheme("tensor", activations=ActivationScheme("float")),
    "FP8, tensor, static": FloatScheme(
        "tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor")
    ),
    "FP8, channel": FloatScheme("channel", activations=ActivationScheme("float")),
    "FP8, block": FloatScheme("block", (128, 128), activations=GROUPS),
}
# Experts, experts of a token, how they are chosen.
ROUTINGS = [
    (8, 2, "random"),
    (16, 1, "one expert"),
    (32, 4, "few experts"),
    (128, 8, "random"),
    (9, 3, "some are none"),
]
TOKENS = [1, 3, 17, 64, 129, 300]


@pytest.fixture(autouse=True)
def on_gpu() -> None:
    if reason := obstacle():
        pytest.skip(reason)


def draw(tokens: int, experts: int, top_k: int, how: str) -> Tensor:
    if how == "one expert":
        return torch.full((tokens, top_k), experts // 2, device="cuda")
    used = top_k + 1 if how == "few experts" else experts
    ids = torch.rand(tokens, used, device="cuda").topk(top_k).indices + (experts - used)
    if how == "some are none":
        ids[torch.rand(ids.shape, device="cuda") < 0.3] = -1
    return ids


def prepared(
    scheme: Scheme, experts: int, dtype: torch.dtype, shape: tuple[int, int] = (203, 392)
) -> tuple[list[QuantizedWeight], PreparedGroupedLinear]:
    weights = [random_weight(scheme, *shape, "cuda") for _ in range(experts)]
    if reason := grouped_fallback_reason(weights, dtype):
        pytest.skip(reason)
    return weights, CudaBackend("for tests", dtype).prepare_grouped(weights, None)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_any_routing_gives_the_products(name: str, routing: tuple[int, int, str]) -> None:
    experts, top_k, how = routing
    scheme = SCHEMES[name]
    dtype = torch.float16 if experts % 3 else torch.bfloat16
    weights, layer = prepared(scheme, experts, dtype)
    for tokens in TOKENS:
        groups = group_tokens(draw(tokens, experts, top_k, how), experts)
        x = torch.randn(tokens, 392, device="cuda").to(dtype)
        out = layer(x, groups)
        quantized = isinstance(scheme, FloatScheme) and scheme.activations is not None
        error = experts_error(out, weights, x, groups, by_token=True)
        assert error < (FLOAT8_TOLERANCE if quantized else TOLERANCE[dtype]), f"{tokens} tokens: {error:.2e}"
        used = int(groups.offsets[-1])
        assert torch.equal(layer(x, groups)[:used], out[:used])
        in_order = layer(x[groups.rows.long().clamp(0, tokens - 1)], groups, in_order=True)
        assert torch.equal(in_order[:used], out[:used])


@pytest.mark.parametrize("shape", [(1, 8), (64, 128), (1536, 2048), (33, 1001)])
def test_odd_and_real_shapes(shape: tuple[int, int]) -> None:
    weights, layer = prepared(IntegerScheme(4, 32, False), 5, torch.bfloat16, shape)
    for tokens in (1, 40, 200):
        groups = group_tokens(draw(tokens, 5, 2, "random"), 5)
        x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
        assert experts_error(layer(x, groups), weights, x, groups, by_token=True) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 8, 512), (4096, 8, 128), (3000, 1, 2), (0, 2, 4)])
def test_many_pairs_are_sorted_by_expert(tokens: int, top_k: int, experts: int) -> None:
    ids = draw(tokens, experts, top_k, "random")
    found, expected = group_tokens(ids, experts), reference.group_tokens(ids, experts)
    assert isinstance(found, CudaTokenGroups)
    for name in ("rows", "places", "offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_one_graph_serves_every_routing() -> None:
    _, layer = prepared(IntegerScheme(4, 128, True), 16, torch.bfloat16, (128, 256))
    for tokens in (4, 150):
        ids, x = draw(tokens, 16, 2, "random"), torch.randn(tokens, 256, device="cuda").bfloat16()
        shares = torch.rand(tokens, 2, device="cuda")

        def step(ids: Tensor = ids, x: Tensor = x, shares: Tensor = shares) -> Tensor:
            groups = group_tokens(ids, 16)
            return combine(layer(x, groups), groups, shares)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for how in ("random", "one expert", "few experts"):
            ids.copy_(draw(tokens, 16, 2, how))
            x.copy_(torch.randn(tokens, 256, device="cuda"))
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, step())


@pytest.mark.parametrize("tokens", [5, 90])
def test_a_broken_token_breaks_no_other(tokens: int) -> None:
    _, layer = prepared(IntegerScheme(4, 128, True), 4, torch.bfloat16, (64, 256))
    groups, x = group_tokens(draw(tokens, 4, 2, "random"), 4), torch.randn(tokens, 256, device="cuda").bfloat16()
    clean = layer(x, groups)
    x[3, 100] = torch.nan
    found = layer(x, groups)
    hit = groups.rows == 3
    assert found[hit].isnan().all() and torch.equal(found[~hit], clean[~hit])


def test_schemes_without_a_kernel_run_one_expert_after_another() -> None:
    scheme = LookupScheme("nf4", 64, "float")
    weights = [random_weight(scheme, 64, 128, "cuda") for _ in range(3)]
    layer = CudaBackend("for tests").prepare_grouped(weights, None)
    groups, x = group_tokens(draw(7, 3, 2, "random"), 3), torch.randn(7, 128, device="cuda").bfloat16()
    assert experts_error(layer(x, groups), weights, x, groups, by_token=True) < 8e-3


def test_groups_of_other_experts_are_refused() -> None:
    weights = [random_weight(IntegerScheme(4, 64, True), 64, 128, "cuda") for _ in range(3)]
    layer = CudaGroupedIntegerLinear(weights, None, torch.bfloat16)
    x, ids = torch.randn(2, 128, device="cuda").bfloat16(), draw(2, 3, 1, "random")
    with pytest.raises(UsageError, match="grouped for 4 experts, but the layer has 3"):
        layer(x, group_tokens(ids, 4))
    with pytest.raises(UsageError, match="not sorted by group_tokens on a GPU"):
        layer(x, reference.group_tokens(ids, 3))
    with pytest.raises(UsageError, match=r"input is torch\.float16, but must be torch\.bfloat16"):
        layer(x.half(), group_tokens(ids, 3))
