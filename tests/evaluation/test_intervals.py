"""Intervals against published quantiles, and against how often they hold what they should."""

from __future__ import annotations

import math

import pytest
import torch

from aphroquant.evaluation.intervals import (
    clustered_stderr,
    mean_interval,
    share_interval,
    student_t,
    wilson,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # the usual printed table, two-sided 95 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (8, 2.306), (30, 2.042), (31, 2.040), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-4)


def test_many_degrees_tend_to_the_normal_quantile_without_a_jump() -> None:
    assert student_t(200) > student_t(201) > student_t(100_000) > 1.9599
    assert student_t(200) - student_t(201) < 1e-4


def test_wilsons_interval_is_that_of_the_published_example() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263 and 0 of 20
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20, 1.959964) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    held = {"mean": 0, "naive": 0, "share": 0}
    for _ in range(400):
        subjects = torch.randn(8, 1, generator=generator, dtype=torch.float64)  # what a window's tokens have in common
        values = (subjects + torch.randn(8, 64, generator=generator, dtype=torch.float64)).flatten()
        mean, stderr = float(values.mean()), clustered_stderr(values, 8)
        low, high = mean_interval(mean, stderr, 8) or (math.nan, math.nan)
        held["mean"] += low <= 0 <= high
        held["naive"] += abs(mean) <= 1.96 * float(values.std()) / math.sqrt(len(values))
        low, high = share_interval(values > 0, 8)
        held["share"] += low <= 0.5 <= high
    assert 0.92 <= held["mean"] / 400 <= 0.98
    assert held["share"] / 400 >= 0.92
    assert held["naive"] / 400 < 0.5  # tokens taken as independent promise what they do not keep


@pytest.mark.parametrize("value", [False, True])
def test_a_share_of_none_or_all_still_has_an_interval(value: bool) -> None:
    low, high = share_interval(torch.full((80,), value), 4)
    assert 0 <= low < high <= 1
    assert (low == 0) != value


def test_one_window_has_no_interval_of_a_mean() -> None:
    assert clustered_stderr(torch.zeros(10), 1) is None
    assert mean_interval(1.0, None, 1) is None
    assert mean_interval(math.inf, math.inf, 4) is None
