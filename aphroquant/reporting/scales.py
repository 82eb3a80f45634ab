"""From figures to places in a plot, linearly or by logarithm, with ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps `low` .. `high` to `start` .. `end`; what lies outside stops at the border."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = (self._linear(number) for number in (self.low, self.high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers between the ends, at most about `count`."""
        return _log_ticks(self.low, self.high, count) if self.logarithmic else _linear_ticks(self.low, self.high, count)


def linear_scale(values: list[float], start: float, end: float) -> Scale:
    """From 0 to above the largest value."""
    top = max([value for value in values if math.isfinite(value)], default=0.0)
    return Scale(0.0, 1.08 * top if top > 0 else 1.0, start, end)


def log_scale(values: list[float], start: float, end: float, *, margin: float = 0.08) -> Scale:
    """Around all values that have a logarithm, with a margin of the whole on both sides."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    low, high = (min(logs), max(logs)) if logs else (-3.0, 0.0)
    spare = max(margin * (high - low), 0.15)
    return Scale(10 ** (low - spare), 10 ** (high + spare), start, end, logarithmic=True)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, thinned out where there are many; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [10.0**power for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(inside) >= 3:
        every = math.ceil(len(inside) / count)
        return inside[::every]
    finer = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    found = [value for value in finer if low <= value <= high]
    return found if len(found) >= 3 else _linear_ticks(low, high, count)
