"""Truncations keep exactly the tokens that their definitions name, judged by a plain sort in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aphroquant.engine.sampling.candidates import Candidates, largest
from aphroquant.engine.sampling.truncation import MinP, Temperature, TopK, TopP, Truncation

LOGITS = arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, -math.inf]),
).filter(lambda logits: np.isfinite(logits).any())


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()


def kept(truncation: Truncation, logits: np.ndarray) -> list[int]:
    ids = truncation(Candidates(None, logits)).ids
    assert ids is not None
    return ids.tolist()


@settings(deadline=None)
@given(LOGITS, st.integers(1, 70))
def test_top_k_keeps_the_k_largest_and_the_first_of_equal_ones(logits: np.ndarray, k: int) -> None:
    expected = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:k]
    assert kept(TopK(k), logits) == sorted(expected)
    assert largest(logits, k).tolist() == sorted(expected)


@settings(max_examples=300, deadline=None)
@given(LOGITS, st.floats(0.001, 0.999))
def test_top_p_keeps_the_shortest_prefix_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probability = probabilities(logits)
    order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
    mass = np.cumsum(probability[order])
    tokens = kept(TopP(p), logits)
    assert len(tokens) >= 1
    dropped = np.delete(logits, tokens)
    assert not len(dropped) or logits[tokens].min() >= dropped.max() - 1e-6, "a likelier token was dropped"
    rounding = 1e-5
    assert mass[len(tokens) - 1] >= p - rounding, "the mass does not reach p: the crossing token was dropped"
    if len(tokens) > 1:
        assert mass[len(tokens) - 2] < p + rounding, "a token too many"


def test_top_p_keeps_the_crossing_token() -> None:
    logits = np.log(np.array([0.3, 0.4, 0.2, 0.1], np.float32))
    assert kept(TopP(0.6), logits) == [0, 1]
    assert kept(TopP(0.1), logits) == [1]


@settings(deadline=None)
@given(LOGITS, st.floats(0.001, 1.0))
def test_min_p_keeps_tokens_near_the_likeliest(logits: np.ndarray, min_p: float) -> None:
    probability = probabilities(logits)
    tokens = set(kept(MinP(min_p), logits))
    assert int(logits.argmax()) in tokens
    for index, value in enumerate(probability):
        if abs(value / probability.max() - min_p) > 1e-5:
            assert (index in tokens) == (value > min_p * probability.max())


@settings(deadline=None)
@given(LOGITS, st.floats(1e-5, 100))
def test_temperature_divides_logits_and_stays_finite_at_the_top(logits: np.ndarray, temperature: float) -> None:
    with np.errstate(over="ignore"):
        scaled = Temperature(temperature)(Candidates(None, logits)).logits
    assert scaled.max() == 0
    assert not np.isnan(scaled).any()
    expected = (logits.astype(np.float64) - float(logits.max())) / temperature
    np.testing.assert_allclose(scaled, expected.astype(np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("truncation", [TopK(2), Temperature(0.5), MinP(0.1), TopP(0.5)])
def test_the_input_is_not_modified(truncation: Truncation) -> None:
    logits = np.array([1.0, 2.0, 3.0, 2.5], np.float32)
    truncation(Candidates(None, logits))
    assert logits.tolist() == [1.0, 2.0, 3.0, 2.5]


@pytest.mark.parametrize("truncation", [TopK(2), MinP(0.5), TopP(0.6)])
def test_narrowing_twice_names_tokens_by_their_vocabulary_ids(truncation: Truncation) -> None:
    logits = np.array([0.0, 5.0, -9.0, 4.9, 5.1], np.float32)
    once = TopK(3)(Candidates(None, logits))
    twice = truncation(once)
    assert twice.ids is not None
    assert set(twice.ids.tolist()) <= {1, 3, 4}
    assert (logits[twice.ids] == twice.logits).all()
