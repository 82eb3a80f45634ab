"""Layers of several experts on the CPU, against float64 and by the properties of a sort."""

from __future__ import annotations

import pytest
import torch

from aphroquant.errors import UsageError
from aphroquant.kernels.dispatch import select_backend
from aphroquant.kernels.grouped import combine, group_tokens
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import FloatScheme, IntegerScheme, QuantizedWeight, Scheme

SCHEMES: list[Scheme] = [IntegerScheme(4, 32, False), FloatScheme("channel")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 3), (9, 3, 5), (40, 8, 8)])
def test_each_token_gets_the_weighted_sum_of_its_experts(tokens: int, top_k: int, experts: int, scheme: Scheme) -> None:
    weights = [random_weight(scheme, 24, 64) for _ in range(experts)]
    biases = [torch.randn(24) for _ in range(experts)]
    layer = select_backend("reference").prepare_grouped(weights, biases)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    x, shares = torch.randn(tokens, 64), torch.rand(tokens, top_k)
    groups = group_tokens(ids, experts)
    found = combine(layer(x, groups), groups, shares)
    matrices = torch.stack([weight.dequantize(torch.float64) for weight in weights])
    added = torch.stack(biases).double()
    for token in range(tokens):
        products = torch.einsum("enk,k->en", matrices, x[token].double()) + added
        expected = (shares[token].double()[:, None] * products[ids[token]]).sum(0)
        torch.testing.assert_close(found[token].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x[groups.rows.long()], groups, in_order=True), layer(x, groups))


def test_places_are_a_stable_sort() -> None:
    ids = torch.randint(0, 5, (50, 3))
    groups = group_tokens(ids, 5)
    by_place = torch.empty(150, dtype=torch.long)
    by_place[groups.places.flatten().long()] = torch.arange(150)
    owners = ids.flatten()[by_place]
    assert torch.equal(owners, owners.sort().values)
    assert all((by_place[owners == expert].diff() > 0).all() for expert in range(5))
    assert torch.equal(groups.rows.long(), by_place // 3)
    assert groups.offsets.tolist() == [0, *torch.bincount(owners, minlength=5).cumsum(0).tolist()]


def test_ids_that_are_no_experts_add_nothing() -> None:
    layer = select_backend("reference").prepare_grouped([QuantizedWeight.dense(torch.eye(4))] * 2, None)
    groups = group_tokens(torch.tensor([[0, -1], [7, 2]]), 2)
    x = torch.randn(2, 4)
    out = combine(layer(x, groups), groups, torch.full((2, 2), 0.5))
    assert torch.equal(out, torch.stack([x[0] / 2, torch.zeros(4)]))


def test_experts_must_be_alike() -> None:
    backend = select_backend("reference")
    weights = [QuantizedWeight.dense(torch.randn(*shape)) for shape in ((4, 8), (4, 9))]
    with pytest.raises(UsageError, match=r"expert 1 is .*\[4, 9\], but expert 0 is .*\[4, 8\]"):
        backend.prepare_grouped(weights, None)
    with pytest.raises(UsageError, match="at least one expert"):
        backend.prepare_grouped([], None)
    with pytest.raises(UsageError, match=r"biases must be 1 of shape \[4\]"):
        backend.prepare_grouped(weights[:1], [torch.zeros(5)])


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = select_backend("reference").prepare_grouped([QuantizedWeight.dense(torch.eye(4))] * 3, None)
    groups = group_tokens(torch.tensor([[0, 1]]), 3)
    with pytest.raises(UsageError, match=r"input has shape \[1, 5\], but must be \[1, 4\]"):
        layer(torch.randn(1, 5), groups)
    with pytest.raises(UsageError, match=r"must be \[2, 4\]"):
        layer(torch.randn(1, 4), groups, in_order=True)
    with pytest.raises(UsageError, match=r"expert_ids is torch\.float32"):
        group_tokens(torch.rand(2, 2), 3)
    with pytest.raises(UsageError, match="num_experts = 0 must be positive"):
        group_tokens(torch.zeros(2, 2, dtype=torch.int64), 0)


def test_the_compiled_kernels_run_experts_one_after_another(compiled: None) -> None:
    weights = [random_weight(IntegerScheme(4, 32, True), 32, 64) for _ in range(3)]
    layer = select_backend("cpu", activations="float").prepare_grouped(weights, None)
    groups, x = group_tokens(torch.tensor([[0, 2], [2, 1]]), 3), torch.randn(2, 64)
    found = layer(x, groups)
    order = torch.tensor([0, 1, 0, 1])
    for place, expert in enumerate([0, 1, 2, 2]):
        expected = weights[expert].dequantize(torch.float64) @ x[order[place]].double()
        torch.testing.assert_close(found[place].double(), expected, rtol=1e-4, atol=1e-4)
