"""Whole chains: distributions, seeds, isolation of rows, penalties, logprobs, unusable logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from aphroquant.engine.sampling import RequestSampler, Sampled, sample
from aphroquant.engine.sampling.candidates import Candidates
from aphroquant.engine.sampling.draw import draw
from aphroquant.engine.types import SamplingParams

NUM_DRAWS = 4000
VOCABULARY = 1000  # above one chunk of the two-level draw


def sampler(
    index: int = 0, prompt: tuple[int, ...] = (), ending: tuple[int, ...] = (), **params: Any
) -> RequestSampler:
    return RequestSampler(SamplingParams(**params), prompt=prompt, ending=ending, index=index)


def one(request_sampler: RequestSampler, logits: torch.Tensor) -> Sampled:
    (sampled,) = sample(logits[None], [request_sampler])
    assert sampled is not None
    return sampled


def tokens(request_sampler: RequestSampler, logits: torch.Tensor, count: int) -> list[int]:
    return [one(request_sampler, logits).token for _ in range(count)]


def chi_square_p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """The chance of a fit this bad or worse if `expected` is the truth; rare cells are pooled."""
    common = expected >= 5
    cells = np.append(observed[common], observed[~common].sum()), np.append(expected[common], expected[~common].sum())
    used = cells[1] > 0
    statistic = float(((cells[0][used] - cells[1][used]) ** 2 / cells[1][used]).sum())
    degrees = int(used.sum()) - 1
    if degrees == 0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)))


def reference_distribution(logits: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """The distribution to draw from, as transformers' own warpers make it, in float64."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits[None].double()
    if "temperature" in params:
        scores = TemperatureLogitsWarper(params["temperature"])(None, scores)
    if "min_p" in params:
        scores = MinPLogitsWarper(params["min_p"])(None, scores)
    if "top_k" in params:
        scores = TopKLogitsWarper(params["top_k"])(None, scores)
    if "top_p" in params:
        scores = TopPLogitsWarper(params["top_p"])(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 12},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    expected = reference_distribution(logits, params).numpy() * NUM_DRAWS
    drawn = tokens(sampler(seed=7, **params), logits, NUM_DRAWS)
    observed = np.bincount(drawn, minlength=VOCABULARY)
    assert observed[expected == 0].sum() == 0, "a token outside the truncation was drawn"
    p_value = chi_square_p_value(observed, expected)
    assert p_value > 1e-3, f"chi-square p-value {p_value:.2e}"


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 5000])
def test_draw_reaches_first_and_last_tokens_and_never_impossible_ones(length: int) -> None:
    class Fixed:
        def __init__(self, position: float) -> None:
            self.position = position

        def random(self) -> float:
            return self.position

    logits = np.full(length, -np.inf, np.float32)
    possible = sorted({0, length // 2, length - 1})
    logits[possible] = 0
    for position in (0.0, 0.2, 0.5, 0.999, 1 - 2**-53):
        generator: Any = Fixed(position)
        expected = possible[min(int(position * len(possible)), len(possible) - 1)]
        assert draw(Candidates(None, logits), generator) == expected


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 20, "temperature": 1.5}])
def test_a_seeded_request_draws_the_same_tokens_whatever_else_is_in_the_batch(params: dict[str, Any]) -> None:
    steps = torch.randn(20, VOCABULARY)
    alone = sampler(seed=5, **params)
    expected = [one(alone, logits).token for logits in steps]
    in_batch = sampler(seed=5, **params)
    others = [
        sampler(temperature=0),
        sampler(seed=5, top_k=3),
        sampler(repetition_penalty=1.5, prompt=(1, 2, 3)),
        sampler(min_p=0.5, frequency_penalty=1.0),
        sampler(min_tokens=5, ending=(4,), logprobs=3),
    ]
    found = []
    for logits in steps:
        rows = [*torch.randn(3, VOCABULARY), logits, *torch.randn(2, VOCABULARY)]
        sampled = sample(torch.stack(rows), [*others[:3], in_batch, *others[3:]])[3]
        assert sampled is not None
        found.append(sampled.token)
    assert found == expected


def test_a_batch_with_samplers_leaves_greedy_rows_alone() -> None:
    logits = torch.randn(1, VOCABULARY).repeat(6, 1)
    greedy = sampler(temperature=0)
    chains = [greedy, sampler(top_p=0.1), greedy, sampler(min_p=0.9), sampler(presence_penalty=2.0), greedy]
    sampled = sample(logits, chains)
    best = int(logits[0].argmax())
    assert [sampled[row] for row in (0, 2, 5)] == [Sampled(best)] * 3
    assert (logits == logits[0]).all(), "the model's logits were modified"


def test_choices_of_one_seeded_request_differ_and_repeat() -> None:
    logits = torch.zeros(VOCABULARY)
    first = tokens(sampler(0, seed=3), logits, 10)
    assert first == tokens(sampler(0, seed=3), logits, 10)
    assert first != tokens(sampler(1, seed=3), logits, 10)
    assert first != tokens(sampler(0, seed=4), logits, 10)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_works(seed: int) -> None:
    logits = torch.zeros(VOCABULARY)
    assert tokens(sampler(seed=seed), logits, 5) == tokens(sampler(seed=seed), logits, 5)


def test_unseeded_requests_differ() -> None:
    logits = torch.zeros(VOCABULARY)
    assert tokens(sampler(), logits, 10) != tokens(sampler(), logits, 10)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([0.0, 1e-3, 3e38, -3e38])
    assert tokens(sampler(temperature=temperature), logits, 3) == [2, 2, 2]


def test_the_lowest_sampled_temperature_survives_extreme_logits() -> None:
    logits = torch.tensor([0.0, 1e-3, 3e38, -3e38])
    assert tokens(sampler(temperature=1e-5, top_p=0.9, min_p=0.1, top_k=3), logits, 3) == [2, 2, 2]


def test_repetition_penalty_equals_transformers_and_counts_the_prompt() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50) * 3
    penalized = sampler(temperature=0, repetition_penalty=1.8, prompt=(3, 4, 4))
    context = [3, 4, 4]
    for _ in range(20):
        expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([context]), logits[None].clone())
        context.append(one(penalized, logits).token)
        assert context[-1] == int(expected.argmax())


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = torch.tensor([1.0, 0.9, 0.5, -5.0])
    assert tokens(sampler(temperature=0, frequency_penalty=0.15, prompt=(0, 0, 0)), logits, 6) == [0, 1, 0, 1, 0, 1]
    assert tokens(sampler(temperature=0, presence_penalty=0.45, prompt=(0, 0, 0)), logits, 5) == [0, 1, 0, 0, 0]


def test_penalties_follow_their_formula_over_many_distinct_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    penalized = sampler(temperature=0, frequency_penalty=0.7, presence_penalty=0.3)
    counts = torch.zeros(40)
    for _ in range(100):
        logits = torch.randn(40, generator=generator)
        expected = int((logits - 0.7 * counts - 0.3 * (counts > 0)).argmax())
        assert one(penalized, logits).token == expected
        counts[expected] += 1


def test_min_tokens_forbids_ending_tokens_until_then() -> None:
    logits = torch.tensor([5.0, 4.0, 1.0])
    assert tokens(sampler(temperature=0, min_tokens=2, ending=(0, 1)), logits, 4) == [2, 2, 0, 0]
    assert tokens(sampler(seed=1, top_k=2, min_tokens=2, ending=(0, 1)), logits, 2) == [2, 2]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0}])
def test_logprobs_are_of_the_raw_distribution(params: dict[str, Any]) -> None:
    logits = torch.randn(VOCABULARY)
    sampled = one(sampler(seed=1, logprobs=4, prompt=tuple(range(500)), **params), logits)
    expected = logits.double().log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen == pytest.approx(float(expected[sampled.token]), abs=1e-5)
    values, ids = expected.topk(4)
    assert [token for token, _ in sampled.logprobs.top] == ids.tolist()
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_zero_reports_the_chosen_token_alone() -> None:
    sampled = one(sampler(temperature=0, logprobs=0), torch.randn(10))
    assert sampled.logprobs is not None
    assert sampled.logprobs.top == []


def test_more_logprobs_than_tokens_report_all_tokens() -> None:
    sampled = one(sampler(temperature=0, logprobs=20), torch.tensor([1.0, 2.0, 2.0]))
    assert sampled.logprobs is not None
    assert [token for token, _ in sampled.logprobs.top] == [1, 2, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5, "presence_penalty": 1.0, "logprobs": 2}])
def test_unusable_logits_fail_their_own_row_only(bad: float, params: dict[str, Any]) -> None:
    logits = torch.zeros(3, 300)
    logits[1, 17] = bad
    sampled = sample(logits, [sampler(**params) for _ in range(3)])
    assert sampled[1] is None
    assert sampled[0] is not None
    assert sampled[2] is not None


def test_a_row_without_any_possible_token_fails() -> None:
    assert sample(torch.full((1, 9), -math.inf), [sampler()]) == [None]


def test_impossible_tokens_are_never_drawn_and_do_not_disturb_truncation() -> None:
    logits = torch.full((VOCABULARY,), -math.inf)
    logits[[5, 900]] = torch.tensor([1.0, 0.5])
    for params in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.01}):
        assert set(tokens(sampler(seed=1, **params), logits, 40)) == {5, 900}
