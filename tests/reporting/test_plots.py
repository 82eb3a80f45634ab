"""Scales, ticks, the Pareto line, labels, and figures in words."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphroquant.reporting.scales import Scale, linear_scale, log_scale
from aphroquant.reporting.scatter import pareto
from aphroquant.reporting.words import duration, figure, megabytes, shortened, tick

POSITIVE = st.floats(1e-12, 1e12)


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_a_logarithmic_scale_keeps_values_inside_and_in_order(values: list[float]) -> None:
    scale = log_scale(values, 50, 400)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(50 < place < 400 for place in places)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(scale.low <= value <= scale.high for value in ticks)


@given(st.lists(st.floats(0, 1e9), max_size=20))
def test_a_linear_scale_begins_at_nothing_and_has_round_ticks(values: list[float]) -> None:
    scale = linear_scale(values, 244, 14)
    assert scale.place(0) == 244
    ticks = scale.ticks()
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 7
    assert all(a < b for a, b in itertools.pairwise(ticks))


def test_equal_values_and_no_values_have_scales() -> None:
    for values in ([], [0.0], [5.0, 5.0], [math.inf], [0.0, math.inf]):
        assert log_scale(values, 0, 1).ticks()
        assert linear_scale(values, 0, 1).ticks()


def test_what_lies_outside_stops_at_the_border() -> None:
    scale = Scale(1, 100, 0, 10, logarithmic=True)
    assert [scale.place(value) for value in (0, 1, 10, 100, 1e9)] == [0, 0, 5, 10, 10]


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_line_has_exactly_those_that_none_beats(seed: int) -> None:
    draw = random.Random(seed)
    sizes, klds = ([draw.randint(1, 8) for _ in range(12)] for _ in range(2))
    found = pareto(sizes, klds)
    points = set(zip(sizes, klds, strict=True))
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {(sizes[i], klds[i]) for i in found} == unbeaten
    assert [sizes[i] for i in found] == sorted(sizes[i] for i in found)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.50934, "0.509"),
        (0.00123, "0.00123"),
        (1.2e-7, "1.20e-07"),
        (12345.6, "12,346"),
        (math.inf, "not finite"),
        (None, "–"),
        (-0.25, "-0.250"),
    ],
)
def test_figures_in_words(value: float | None, words: str) -> None:
    assert figure(value) == words


def test_other_words() -> None:
    assert [tick(value) for value in (1e-6, 0.001, 0.5, 200, 1e5, 0)] == ["1e-6", "0.001", "0.5", "200", "1e5", "0"]
    assert megabytes(283_864_320) == "283.9 MB"
    assert megabytes(16_060_000_000) == "16.06 GB"
    assert [duration(seconds) for seconds in (0.04, 119, 150, 9000)] == ["0.0 s", "119.0 s", "2.5 min", "2.5 h"]
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abc", 5) == "abc"
