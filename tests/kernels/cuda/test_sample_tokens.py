"""Sampling on a GPU or emulated, beside the samplers of the host."""

from __future__ import annotations

import pytest
import torch

from aphroquant.engine.cuda.sampling import DeviceSampling
from aphroquant.engine.sampling import RequestSampler, sample
from aphroquant.engine.types import SamplingParams
from aphroquant.kernels.cuda.sampling.draws import TokenDraw
from aphroquant.kernels.cuda.sampling.tokens import sample_tokens


def samplers(params: list[SamplingParams]) -> list[RequestSampler]:
    return [RequestSampler(own, index=index) for index, own in enumerate(params)]


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=5, seed=2),
    SamplingParams(temperature=1.0, top_p=0.6, seed=3),
    SamplingParams(temperature=0.9, min_p=0.1, seed=4),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=5),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0.5, repetition_penalty=1.2, seed=6),
]


@pytest.mark.parametrize("vocab_size", [500, 1027])
def test_batched_sampling_gives_the_tokens_of_the_host_samplers(device: torch.device, vocab_size: int) -> None:
    ours, theirs = samplers(PARAMS), samplers(PARAMS)
    for step in range(2 if device.type == "cpu" else 40):
        logits = torch.randn(len(PARAMS), vocab_size, generator=torch.Generator().manual_seed(step)) * 3
        assert DeviceSampling(logits.to(device), ours).result() == sample(logits, theirs)


def test_draws_follow_the_distribution(device: torch.device) -> None:
    count = 4000 if device.type == "cuda" else 50
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], device=device).expand(count, 4).contiguous()
    positions = [(index + 0.5) / count for index in range(count)]  # even: the shares are then the probabilities
    tokens = sample_tokens(logits, [TokenDraw(position, temperature=0.5) for position in positions]).tokens
    shares = torch.bincount(tokens.cpu(), minlength=4) / count
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(0).cpu(), atol=1.5 / count)


def test_rows_that_are_no_numbers_fail_alone(device: torch.device) -> None:
    logits = torch.randn(4, 50).to(device)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    sampling = DeviceSampling(logits, samplers([PARAMS[0], PARAMS[0], PARAMS[1], PARAMS[1]]))
    results = sampling.result()
    assert [result is None for result in results] == [False, True, True, False]
    assert sampling.on_device is not None
    assert sampling.on_device.tolist() == [0 if result is None else result.token for result in results]


def test_of_equal_logits_the_first_is_greedy_and_top_k_keeps_the_lower_ids(device: torch.device) -> None:
    logits = torch.zeros(9, 10, device=device)
    draws = [TokenDraw()] + [TokenDraw(position / 8, temperature=1, top_k=3) for position in range(8)]
    tokens = sample_tokens(logits, draws).tokens.tolist()
    assert tokens[0] == 0
    assert set(tokens[1:]) == {0, 1, 2}


def test_forbidden_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((3, 40), -torch.inf, device=device)
    logits[:, 7], logits[:, 31] = 1.0, 0.5
    draws = [TokenDraw(position, temperature=2.0) for position in (0.0, 0.5, 0.999999)]
    assert sample_tokens(logits, draws).tokens.tolist() == [7, 7, 31]


def drawn(logits: torch.Tensor, draw: TokenDraw, count: int, device: torch.device) -> set[int]:
    """Tokens at even positions of the distribution over one row."""
    draws = [draw._replace(position=(index + 0.5) / count) for index in range(count)]
    return set(sample_tokens(logits.to(device).expand(count, -1).contiguous(), draws).tokens.tolist())


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(device: torch.device, spread: float) -> None:
    count = 400 if device.type == "cuda" else 24
    logits = torch.randn(1, 331, generator=torch.Generator().manual_seed(3)) * spread
    weights = logits[0].double().softmax(0)
    order = weights.argsort(descending=True, stable=True)
    nucleus = order[: int((weights[order].cumsum(0) < 0.7).sum()) + 1].tolist()
    tokens = drawn(logits, TokenDraw(temperature=1.0, top_p=0.7), count, device)
    assert tokens <= set(nucleus)
    heavy = {token for token in nucleus if weights[token] > 1.001 / count}  # no gap between positions is as large
    assert heavy <= tokens


def test_more_equal_logits_than_are_listed_at_once_are_cut_by_their_ids(device: torch.device) -> None:
    logits = torch.full((1, 5001), 0.25)
    logits[0, 77] = 0.5
    count = 40 if device.type == "cuda" else 3
    kept = sorted(drawn(logits, TokenDraw(temperature=1e-3, top_k=4000), count, device))
    assert kept == [77]
    flat = drawn(logits, TokenDraw(temperature=100.0, top_k=3000), count, device)
    assert max(flat) < 3000
    ends = [TokenDraw(position, temperature=100.0, top_p=0.5) for position in (0.0, 1 - 1e-9)]
    first, last = sample_tokens(logits.to(device).expand(2, -1).contiguous(), ends).tokens.tolist()
    assert first == 0
    assert abs(last - 2499) <= 2


def test_large_and_infinite_logits_are_ordered_like_all_others(device: torch.device) -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0, -torch.inf, 3e38, 0.0]], device=device).expand(3, -1).contiguous()
    draws = [
        TokenDraw(0.99, temperature=1.0, top_k=1),
        TokenDraw(0.99, temperature=1.0, top_p=0.9),
        TokenDraw(0.99, temperature=1.0, top_k=3, top_p=0.3),
    ]
    assert sample_tokens(logits, draws).tokens.tolist() == [0, 4, 0]


def test_rows_for_the_samplers_of_the_host_leave_nothing_to_go_on_with(device: torch.device) -> None:
    logits = torch.randn(2, 40, device=device)
    assert DeviceSampling(logits, samplers([PARAMS[0], PARAMS[6]])).on_device is None
