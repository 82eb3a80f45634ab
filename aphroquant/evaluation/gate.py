"""The quality gate: bounds that a result must keep. A figure that is not a number keeps none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

from aphroquant.errors import GateError, UsageError
from aphroquant.evaluation.noise import NoiseFloor
from aphroquant.evaluation.result import Evaluation, TextFigures

Figures: TypeAlias = Evaluation | TextFigures


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
    """One bound and how the result stands to it: value <= bound for max_*, value >= bound for min_*.

    `text` names the text whose figure it is; None: of all texts together. `note` says what makes the verdict doubtful.
    """

    name: str
    value: float
    bound: float
    passed: bool
    text: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Plain values for JSON; a value that is not finite becomes None."""
        return self._asdict() | {"value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateCheck:
        """The same from its plain values."""
        value = math.inf if data["value"] is None else float(data["value"])
        text, note = data.get("text"), data.get("note")
        return cls(str(data["name"]), value, float(data["bound"]), bool(data["passed"]), text, note)

    @property
    def label(self) -> str:
        """The bound and the text that it is of."""
        return f"{self.name} {self._told(self.bound)}" + ("" if self.text is None else f" on {self.text}")

    @property
    def is_relative(self) -> bool:
        """Whether the bound is what an earlier release had, and `note` says what that was."""
        return self.name.endswith("_vs_baseline")

    @property
    def sentence(self) -> str:
        """How the figure stands to the bound: mean KLD 0.2 is above max_kld 0.1."""
        against = "is below" if self.name.startswith("min") else "is above"
        verdict = "keeps" if self.passed else against
        return f"{_WORDS.get(self.name, self.name)} {self._told(self.value, 4)} {verdict} {self.label}"

    @property
    def counts_bytes(self) -> bool:
        return self.name.startswith("bytes")

    def _told(self, value: float, digits: int = 6) -> str:
        return f"{value:,.0f}" if self.counts_bytes else f"{value:.{digits}g}"


_WORDS: Mapping[str, str] = {
    "max_non_finite": "share of logits that are not finite",
    "max_kld": "mean KLD",
    "max_p99_kld": "p99 KLD",
    "max_p999_kld": "p99.9 KLD",
    "min_top1": "top-1 agreement",
    "max_ppl_ratio": "perplexity ratio",
    "kld_vs_baseline": "mean KLD",
    "p99_kld_vs_baseline": "p99 KLD",
    "top1_changes_vs_baseline": "share of changed top-1 tokens",
    "bytes_vs_baseline": "size in bytes",
}
_FIGURES: dict[str, Callable[[Figures], float]] = {
    "max_kld": lambda result: result.mean_kld,
    "max_p99_kld": lambda result: result.p99_kld,
    "max_p999_kld": lambda result: result.p999_kld,
    "min_top1": lambda result: result.top1_agreement,
    "max_ppl_ratio": lambda result: result.perplexity_ratio,
}
_FLOORS: dict[str, Callable[[NoiseFloor], float]] = {
    "max_kld": lambda floor: floor.mean_kld,
    "max_p99_kld": lambda floor: floor.p99_kld,
    "max_p999_kld": lambda floor: floor.p999_kld,
    "min_top1": lambda floor: floor.top1_agreement,
}


def check_bounds(result: Evaluation, bounds: Bounds) -> list[GateCheck]:
    """Every given bound in turn; first of all, and always, that no position has logits that are not finite.

    Bounds hold for all texts together and, where there are several, for each of them.
    """
    checks = [GateCheck("max_non_finite", result.non_finite_share, 0.0, result.non_finite_share == 0)]
    parts: list[tuple[str | None, Figures]] = [(None, result)]
    if len(result.texts) > 1:
        parts += [(part.text.name, part) for part in result.texts]
    for name in _FIGURES:
        bound = getattr(bounds, name)
        if bound is not None:
            note = _note(name, bound, result.noise_floor)
            checks += [_check(name, bound, figures, text, note) for text, figures in parts]
    return checks


def check_text_bounds(result: Evaluation, text: str, bounds: Bounds) -> list[GateCheck]:
    """Every given bound on the figures of one text alone, by the name that it has in the result."""
    figures: Figures = next((part for part in result.texts if part.text.name == text), result)
    given = {name: bound for name in _FIGURES if (bound := getattr(bounds, name)) is not None}
    return [_check(name, bound, figures, text, _note(name, bound, result.noise_floor)) for name, bound in given.items()]


def _check(name: str, bound: float, figures: Figures, text: str | None, note: str | None) -> GateCheck:
    value = _FIGURES[name](figures)
    return GateCheck(name, value, bound, value >= bound if name == "min_top1" else value <= bound, text, note)


def _note(name: str, bound: float, floor: NoiseFloor | None) -> str | None:
    """That the bound asks for more than the base itself keeps, if it does."""
    if floor is None or name not in _FLOORS:
        return None
    value = _FLOORS[name](floor)
    if value >= bound if name == "min_top1" else value <= bound:
        return None
    return f"the base itself has {value:.3g} with {floor.setting}: a bound beyond that noise floor says nothing"


def require(checks: Sequence[GateCheck]) -> None:
    """Raise GateError naming the checks that failed, if any did."""
    require_all({"": checks})


def require_all(checks: Mapping[str, Sequence[GateCheck]]) -> None:
    """The same for several models by name."""
    failed = {name: [check for check in of_one if not check.passed] for name, of_one in checks.items()}
    missed = [
        (f"{name}: " if name else "") + ", ".join(check.sentence for check in of_one)
        for name, of_one in failed.items()
        if of_one
    ]
    if missed:
        raise GateError(f"the quality gate failed: {'; '.join(missed)}")
