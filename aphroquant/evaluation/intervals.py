"""Standard errors and 95 % intervals that respect windows.

Tokens of one window share a context and a subject, so they are not independent draws, and the usual sd / sqrt(tokens)
says too little; the spread between windows is the honest yardstick. With n windows of equal length the standard error
is sd(window means) / sqrt(n), and the interval takes Student's t with n - 1 degrees of freedom: 8 windows are few.
A share (top-1 agreement) gets Wilson's interval, with as many tokens as would be as certain if they were independent.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from torch import Tensor

CONFIDENCE = 0.95
Interval: TypeAlias = tuple[float, float]


def clustered_stderr(values: Tensor, num_windows: int) -> float | None:
    """Standard error of the mean of `num_windows` equally long windows, from the spread of their means."""
    if num_windows < 2:
        return None
    return token_stderr(values.view(num_windows, -1).mean(1))


def token_stderr(values: Tensor) -> float:
    """sd / sqrt(n), as if the values were independent."""
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.inf
    return float(values.std()) / math.sqrt(len(values))


def mean_interval(mean: float, stderr: float | None, num_windows: int) -> Interval | None:
    """mean +- t * stderr; None where there is no standard error, or no finite one."""
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(mean):
        return None
    reach = student_t(num_windows - 1) * stderr
    return mean - reach, mean + reach


def share_interval(flags: Tensor, num_windows: int) -> Interval:
    """Wilson's interval of the share of true flags, for as many independent flags as the windows' spread allows."""
    count = len(flags)
    share = float(flags.double().mean())
    stderr = clustered_stderr(flags.double(), num_windows)
    effective = float(count)
    if stderr:
        effective = min(effective, share * (1 - share) / stderr**2)  # never more certain than independent tokens
    reach = student_t(num_windows - 1) if num_windows > 1 else student_t(count)
    return wilson(share, effective, reach)


def wilson(share: float, count: float, reach: float) -> Interval:
    """Wilson's score interval of a share of `count` draws; `reach` is the quantile, 1.96 for 95 %."""
    weight = reach**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = reach / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The quantile t with P(|T| <= t) = confidence for Student's distribution, by bisection of its integral."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t), exactly: a finite sum in the angle atan(t / sqrt(degrees)) (Abramowitz and Stegun 26.7.3, .4)."""
    if degrees > 200:
        return math.erf(t / math.sqrt(2) * (1 - 1 / (4 * degrees)) / math.sqrt(1 + t * t / (2 * degrees)))
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
