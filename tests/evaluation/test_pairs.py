"""Two candidates on the same positions."""

from __future__ import annotations

import math

import pytest
import torch

from aphroquant.evaluation.pairs import Comparison, compare_pair
from aphroquant.evaluation.positions import Positions, compare_several

WINDOWS, LENGTH, VOCABULARY = 8, 60, 30


def candidates(*noises: float) -> list[Positions]:
    base = 3 * torch.randn(WINDOWS * LENGTH, VOCABULARY)
    models = [base + noise * torch.randn_like(base) for noise in noises]
    return compare_several(base, models, torch.randint(0, VOCABULARY, (len(base),)))


def test_less_noise_is_told_apart_as_nearer_whatever_the_order() -> None:
    less, more = candidates(0.1, 0.4)
    forward = compare_pair(("less", "more"), less, more, WINDOWS, None)
    backward = compare_pair(("more", "less"), more, less, WINDOWS, None)
    assert forward.better == backward.better == "less"
    assert forward.kld.mean == pytest.approx(float(less.kld.mean() - more.kld.mean()))
    assert forward.kld.mean == -backward.kld.mean < 0
    assert forward.loss.mean == pytest.approx(float(more.model_logprob.mean() - less.model_logprob.mean()))
    assert forward.top1.mean == pytest.approx(forward.only_first_agrees - forward.only_second_agrees)


def test_equal_noise_is_rarely_told_apart() -> None:
    told = sum(compare_pair(("a", "b"), *candidates(0.3, 0.3), WINDOWS, None).kld.distinguishable for _ in range(60))
    assert told <= 9  # 3 are expected of 95 % intervals


def test_a_model_against_itself_does_not_differ() -> None:
    (one,) = candidates(0.3)
    found = compare_pair(("a", "b"), one, one, WINDOWS, None)
    assert found.kld.mean == found.loss.mean == found.top1.mean == 0
    assert found.better is None


def test_pairing_sees_a_difference_that_two_separate_errors_hide() -> None:
    first, _ = candidates(0.3, 0.3)
    shared = torch.randn(WINDOWS, 1, dtype=torch.float64).abs().expand(WINDOWS, LENGTH).reshape(-1)
    noise = 0.001 * torch.randn(WINDOWS * LENGTH, dtype=torch.float64)
    hard = first._replace(kld=5 * shared)
    harder = first._replace(kld=5 * shared + 0.01 + noise)
    found = compare_pair(("a", "b"), hard, harder, WINDOWS, None)
    assert found.better == "a"
    assert found.kld.stderr is not None
    assert found.kld.stderr < 0.001 < float(hard.kld.view(WINDOWS, -1).mean(1).std())


def test_a_broken_candidate_is_worse_and_two_broken_ones_are_equal() -> None:
    sound, other = candidates(0.1, 0.1)
    finite = sound.model_finite.clone()
    finite[7] = False
    broken = sound._replace(
        kld=sound.kld.masked_fill(~finite, math.inf),
        model_logprob=sound.model_logprob.masked_fill(~finite, -math.inf),
        model_finite=finite,
    )
    assert compare_pair(("sound", "broken"), other, broken, WINDOWS, None).better == "sound"
    assert compare_pair(("a", "b"), broken, broken, WINDOWS, None).better is None


def test_plain_values_give_the_comparison_back() -> None:
    found = compare_pair(("a", "b"), *candidates(0.1, 0.4), WINDOWS, None)
    assert Comparison.from_dict(found.to_dict()) == found
