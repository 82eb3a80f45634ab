"""The quality gate: bounds that a result must keep. A figure that is not a number keeps none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from aphroquant.errors import GateError, UsageError
from aphroquant.evaluation.result import Evaluation


@dataclass(frozen=True)
class Bounds:
    """Largest divergences (nats) and perplexity ratio, smallest share of equal top-1 tokens; None is no bound."""

    max_kld: float | None = None
    max_p99_kld: float | None = None
    max_p999_kld: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value >= 0:
                raise UsageError(f"{field.name} = {value} must be a number of at least 0")
        if self.min_top1 is not None and self.min_top1 > 1:
            raise UsageError(f"min_top1 = {self.min_top1} must be at most 1: it is a share", hint="for 90 % give 0.9")


class GateCheck(NamedTuple):
    """One bound and how the result stands to it: value <= bound for max_*, value >= bound for min_*."""

    name: str
    value: float
    bound: float
    passed: bool

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Plain values for JSON; a value that is not finite becomes None."""
        return self._asdict() | {"value": self.value if math.isfinite(self.value) else None}


_FIGURES: dict[str, Callable[[Evaluation], float]] = {
    "max_kld": lambda result: result.mean_kld,
    "max_p99_kld": lambda result: result.p99_kld,
    "max_p999_kld": lambda result: result.p999_kld,
    "min_top1": lambda result: result.top1_agreement,
    "max_ppl_ratio": lambda result: result.perplexity_ratio,
}


def check_bounds(result: Evaluation, bounds: Bounds) -> list[GateCheck]:
    """Every given bound in turn; first of all, and always, that no position has logits that are not finite."""
    checks = [GateCheck("max_non_finite", result.non_finite_share, 0.0, result.non_finite_share == 0)]
    for name, figure in _FIGURES.items():
        bound = getattr(bounds, name)
        if bound is not None:
            value = figure(result)
            checks.append(GateCheck(name, value, bound, value >= bound if name == "min_top1" else value <= bound))
    return checks


def require(checks: list[GateCheck]) -> None:
    """Raise GateError naming the checks that failed, if any did."""
    failed = [check for check in checks if not check.passed]
    if failed:
        missed = ", ".join(f"{check.name} {check.bound:g} (is {check.value:.4g})" for check in failed)
        raise GateError(f"the quality gate failed: {missed}")
