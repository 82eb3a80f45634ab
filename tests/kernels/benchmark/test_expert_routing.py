"""Which experts are drawn for timings."""

from __future__ import annotations

import pytest

from aphroquant.kernels.benchmark.expert_routing import draw_experts, num_active
from aphroquant.kernels.benchmark.expert_shapes import EXPERT_MODELS, expert_shapes


@pytest.mark.parametrize("tokens", [1, 5, 16, 300])
@pytest.mark.parametrize("model", EXPERT_MODELS)
def test_every_token_gets_different_experts(model: str, tokens: int) -> None:
    shape = expert_shapes(model)[0]
    for ids in draw_experts(shape, tokens, 3):
        assert ids.shape == (tokens, shape.top_k)
        assert int(ids.min()) >= 0 and int(ids.max()) < shape.experts
        assert all(len(set(row)) == shape.top_k for row in ids.tolist())


def test_few_tokens_use_all_experts_before_any_again() -> None:
    shape = expert_shapes("qwen3-30b-a3b")[0]
    drawn = draw_experts(shape, 2, 8)
    assert sorted(expert for ids in drawn for expert in ids.flatten().tolist()) == list(range(128))
    assert [num_active(ids) for ids in drawn] == [16] * 8


def test_many_tokens_draw_at_random() -> None:
    shape = expert_shapes("qwen3-30b-a3b")[0]
    first, second = draw_experts(shape, 64, 2)
    assert not first.equal(second)
    counts = first.flatten().bincount(minlength=128)
    assert 2 <= float(counts.float().var()) <= 6  # of 4 on average; 0 if every expert got as many
