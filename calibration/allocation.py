"""Which option each of many items gets under a budget: the fewest damages in all, then what a measurement says.

Nothing here knows what an item is. Groups of layers with their bit widths are items, and so are keys and values of a
layer's cache; an option costs so many bytes (or whatever the budget counts) and does so much damage.

`allocate` is exact for damages that add up (dynamic programming over the choices that nothing cheaper is as good as).
Estimates of damages are wrong, though, and large ones do not add up: `improve` measures the whole, learns from it which
items the estimates favour, and allocates anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aphroquant.errors import UsageError

_MOST_POINTS = 1 << 14  # of a front; beyond, only the best of costs that are nearly the same is kept
# Of the factors by which damages are wrong, before anything is measured. With 0.6 and 0.3 most drawn choices of 3.5
# bits for SmolLM2-135M did more damage than the first.
_KIND_SPREAD, _OWN_SPREAD = 0.35, 0.2
_LEAST_FACTOR = 0.05
_NOISE = 0.02  # of a measurement, that damages which do not quite add up make, relative
_SMALLEST = 1e-30
_DRAWS = 20  # until one is new

Choice = tuple[int, ...]  # the option of each item
Measure = Callable[[Choice], float]


class Option(NamedTuple):
    """One way to treat an item."""

    cost: int
    damage: float


class Improved(NamedTuple):
    """The best choice found, what was measured of it and of the one that it began with, and how many were measured."""

    choice: Choice
    before: float
    after: float
    measured: int


def allocate(items: Sequence[Sequence[Option]], budget: int) -> Choice:
    """The choice of least damage that costs at most `budget`. UsageError if even the cheapest costs more."""
    least = [min(option.cost for option in options) for options in items]
    if sum(least) > budget:
        raise UsageError(f"a budget of {budget} is less than the {sum(least)} that the cheapest options cost")
    front = _Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int32), np.zeros(1, np.int16))
    fronts, left = [], sum(least)
    for options, cheapest in zip(items, least, strict=True):
        left -= cheapest
        front = _extended(front, options, budget - left)
        fronts.append(front)
    place, choice = len(front.costs) - 1, list[int]()  # damages fall along a front
    for front in reversed(fronts):
        choice.append(int(front.options[place]))
        place = int(front.parents[place])
    return tuple(reversed(choice))


def cost_of(items: Sequence[Sequence[Option]], choice: Choice) -> int:
    """What a choice costs."""
    return sum(options[number].cost for options, number in zip(items, choice, strict=True))


def damage_of(items: Sequence[Sequence[Option]], choice: Choice) -> float:
    """What damage it does, as if damages added up."""
    return sum(options[number].damage for options, number in zip(items, choice, strict=True))


def improve(
    items: Sequence[Sequence[Option]],
    budget: int,
    measure: Measure,
    *,
    tries: int,
    seed: int,
    kinds: Sequence[str] | None = None,
) -> Improved:
    """The best of what `allocate` gives and of up to `tries` others. The same for the same seed.

    `kinds` has a word for each item: the damages of items of one kind may be wrong by a common factor."""
    belief = _Belief(items, kinds if kinds is not None else [str(item) for item in range(len(items))], seed)
    best = allocate(items, budget)
    before = after = measure(best)
    belief.learn(best, before)
    seen = {best}
    for number in range(tries):
        found = belief.expect(budget) if number % 2 else belief.draw(budget)
        if found in seen:
            found = next((drawn for _ in range(_DRAWS) if (drawn := belief.draw(budget)) not in seen), best)
        if found in seen:
            break
        seen.add(found)
        value = measure(found)
        belief.learn(found, value)
        if value < after:
            best, after = found, value
    return Improved(best, before, after, len(seen))


class _Front(NamedTuple):
    """Choices of the items so far that nothing cheaper is as good as: costs rise, damages fall. `parents` are places
    in the front before, `options` what the last item got."""

    costs: NDArray[np.int64]
    damages: NDArray[np.float64]
    parents: NDArray[np.int32]
    options: NDArray[np.int16]


def _extended(front: _Front, options: Sequence[Option], limit: int) -> _Front:
    """The front with one more item; choices that cost more than `limit` could not be completed."""
    own_costs = np.array([option.cost for option in options], np.int64)
    own_damages = np.array([option.damage for option in options], np.float64)
    costs = (front.costs[:, None] + own_costs).ravel()
    damages = (front.damages[:, None] + own_damages).ravel()
    order = np.lexsort((damages, costs))
    order = order[costs[order] <= limit]
    lowest = np.minimum.accumulate(damages[order])
    better = np.ones(len(order), bool)
    better[1:] = damages[order][1:] < lowest[:-1]
    order = _thinned(order[better], costs)
    parents, chosen = np.divmod(order, len(options))
    return _Front(costs[order], damages[order], parents.astype(np.int32), chosen.astype(np.int16))


def _thinned(order: NDArray[np.int64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most _MOST_POINTS of the points: the cheapest, and the best of each of so many equal spans of cost."""
    if len(order) <= _MOST_POINTS:
        return order
    lowest, highest = costs[order[0]], costs[order[-1]]
    spans = (costs[order] - lowest) * (_MOST_POINTS - 1) // max(highest - lowest, 1)
    last = np.ones(len(order), bool)
    last[:-1] = spans[1:] != spans[:-1]
    last[0] = True
    return order[last]


class _Belief:
    """What measurements tell of the damages: each item's are off by a factor, items of a kind by much the same one.

    The factors are jointly normal at any time: what is measured is a sum of them with known weights, the damages of the
    options chosen. Drawing them from that and allocating exactly tries what may well be best (Thompson sampling).
    """

    def __init__(self, items: Sequence[Sequence[Option]], kinds: Sequence[str], seed: int) -> None:
        self._items = items
        self._random = np.random.default_rng(seed)
        same = np.array([[one == other for other in kinds] for one in kinds], np.float64).reshape(len(items), -1)
        self._mean = np.ones(len(items))
        self._covariance = _KIND_SPREAD**2 * same + _OWN_SPREAD**2 * np.eye(len(items))
        self._scale: float | None = None

    def learn(self, choice: Choice, value: float) -> None:
        """Take in what was measured of a choice. The first measurement tells what unit damages are in."""
        damages = np.array([options[number].damage for options, number in zip(self._items, choice, strict=True)])
        if self._scale is None:
            self._scale = value / damages.sum() if damages.sum() > 0 and value > 0 else 1.0
        weights = damages * self._scale
        spread = self._covariance @ weights
        gain = spread / (weights @ spread + (_NOISE * value) ** 2 + _SMALLEST)
        self._mean = self._mean + gain * (value - weights @ self._mean)
        self._covariance = self._covariance - np.outer(gain, spread)

    def expect(self, budget: int) -> Choice:
        """The best choice if the factors are what they are likeliest to be."""
        return self._allocate(self._mean, budget)

    def draw(self, budget: int) -> Choice:
        """The best choice if the factors are what they may be."""
        values, vectors = np.linalg.eigh(self._covariance)
        normal = self._random.standard_normal(len(values))
        return self._allocate(self._mean + vectors @ (np.sqrt(values.clip(min=0)) * normal), budget)

    def _allocate(self, factors: NDArray[np.float64], budget: int) -> Choice:
        items = [
            [Option(option.cost, option.damage * float(factor)) for option in options]
            for options, factor in zip(self._items, factors.clip(min=_LEAST_FACTOR), strict=True)
        ]
        return allocate(items, budget)
