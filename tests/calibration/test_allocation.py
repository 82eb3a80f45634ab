"""Allocation: as good as trying everything, never over the budget, the same each time."""

from __future__ import annotations

import itertools
import random

import pytest

from aphroquant.calibration import allocation
from aphroquant.calibration.allocation import Choice, Option, allocate, cost_of, damage_of, improve
from aphroquant.errors import UsageError

Items = list[list[Option]]


def drawn(seed: int, num_items: int = 6, most: int = 4) -> tuple[Items, int]:
    """Items with options of random costs and damages, and a budget that some choices meet."""
    drawing = random.Random(seed)
    items = [
        [
            Option(drawing.randint(0, 30), drawing.choice([drawing.random(), 0.5]))
            for _ in range(drawing.randint(1, most))
        ]
        for _ in range(num_items)
    ]
    low, high = (sum(choose(o.cost for o in options) for options in items) for choose in (min, max))
    return items, drawing.randint(low, high)


def best_of_all(items: Items, budget: int) -> float:
    choices = itertools.product(*(range(len(options)) for options in items))
    return min(damage_of(items, choice) for choice in choices if cost_of(items, choice) <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_does_less_damage(seed: int) -> None:
    items, budget = drawn(seed)
    choice = allocate(items, budget)
    assert cost_of(items, choice) <= budget
    assert damage_of(items, choice) == pytest.approx(best_of_all(items, budget), abs=1e-12)


def test_more_budget_never_does_more_damage() -> None:
    items, _ = drawn(1, 30)
    low = sum(min(option.cost for option in options) for options in items)
    damages = [damage_of(items, allocate(items, budget)) for budget in range(low, low + 200, 7)]
    assert damages == sorted(damages, reverse=True)


def test_thinned_fronts_keep_to_the_budget_and_lose_little(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = random.Random(0)
    items = [
        [Option(bits * 1000 + drawing.randint(0, 99), drawing.random() * 4.0**-bits) for bits in (2, 3, 4, 8)]
        for _ in range(60)
    ]
    budget = 60 * 3500
    exact = damage_of(items, allocate(items, budget))
    monkeypatch.setattr(allocation, "_MOST_POINTS", 256)
    choice = allocate(items, budget)
    assert 0.99 * budget < cost_of(items, choice) <= budget
    assert exact <= damage_of(items, choice) < 1.01 * exact


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(UsageError, match="a budget of 4 is less than the 5"):
        allocate([[Option(2, 1.0), Option(3, 0.5)], [Option(3, 1.0)]], 4)


def test_nothing_to_allocate_is_an_empty_choice() -> None:
    assert allocate([], 0) == ()


@pytest.mark.parametrize("seed", range(10))
def test_measured_improvement_keeps_to_the_budget_and_is_never_worse(seed: int) -> None:
    items, budget = drawn(seed, 8)
    truth = [
        [option.damage * random.Random(f"{seed}{i}{n}").uniform(0.3, 3) for n, option in enumerate(o)]
        for i, o in enumerate(items)
    ]
    asked: list[Choice] = []

    def measure(choice: Choice) -> float:
        asked.append(choice)
        return sum(own[number] for own, number in zip(truth, choice, strict=True))

    start = allocate(items, budget)
    found = improve(items, budget, measure, tries=30, seed=3)
    assert all(cost_of(items, choice) <= budget for choice in asked)
    assert len(set(asked)) == len(asked) == found.measured <= 31
    assert found.after == measure(found.choice) <= found.before == measure(start)
    assert improve(items, budget, measure, tries=30, seed=3) == found


def test_improvement_finds_what_the_prior_got_wrong() -> None:
    """Two kinds of items that the prior takes for alike; the measurement says that one matters three times more."""
    drawing = random.Random(0)
    items = [[Option(bits, drawing.uniform(0.5, 2) * 4.0**-bits) for bits in (2, 3, 4)] for _ in range(40)]
    kinds = ["a", "b"] * 20

    def measure(choice: Choice) -> float:
        return damage_of(true, choice)

    true = [
        [Option(o.cost, o.damage * (3 if kind == "a" else 1)) for o in options]
        for options, kind in zip(items, kinds, strict=True)
    ]
    best = damage_of(true, allocate(true, 130))
    found = improve(items, 130, measure, tries=12, seed=0, kinds=kinds)
    assert found.after - best < 0.25 * (found.before - best)
