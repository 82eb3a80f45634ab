"""Two candidates on the same positions: the mean difference and whether it can be told from chance.

Differences are taken position by position before anything is averaged, so that what both find hard cancels; their
standard error is clustered by window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aphroquant.evaluation.intervals import Interval, clustered_stderr, mean_interval
from aphroquant.evaluation.noise import NoiseFloor
from aphroquant.evaluation.plain import from_plain, to_plain
from aphroquant.evaluation.positions import Positions


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of first - second over positions. `distinguishable`: its 95 % interval leaves 0 out."""

    mean: float
    stderr: float | None
    interval: Interval | None
    distinguishable: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two candidates. The differences are first - second of divergence, of token loss, and of top-1 agreement.

    `better` is the one of lower divergence if the two can be told apart. `below_floor` says that they differ by less
    than the base differs from itself in another number format; None if that was not measured.
    """

    first: str
    second: str
    kld: PairedDifference
    loss: PairedDifference
    top1: PairedDifference
    only_first_agrees: float  # share of positions where only the first has the base's most likely token
    only_second_agrees: float
    better: str | None
    below_floor: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """The same from its plain values."""
        return from_plain(cls, data, "comparison")


def compare_pair(
    names: tuple[str, str], first: Positions, second: Positions, num_windows: int, floor: NoiseFloor | None
) -> Comparison:
    """How two candidates differ over the same windows."""
    kld = _difference(first.kld, second.kld, num_windows)
    better = None
    if kld.distinguishable:
        better = names[0] if kld.mean < 0 else names[1]
    return Comparison(
        first=names[0],
        second=names[1],
        kld=kld,
        loss=_difference(second.model_logprob, first.model_logprob, num_windows),
        top1=_difference(first.same_top1.double(), second.same_top1.double(), num_windows),
        only_first_agrees=float((first.same_top1 & ~second.same_top1).double().mean()),
        only_second_agrees=float((second.same_top1 & ~first.same_top1).double().mean()),
        better=better,
        below_floor=None if floor is None else abs(kld.mean) < floor.mean_kld,
    )


def _difference(first: Any, second: Any, num_windows: int) -> PairedDifference:
    """Infinite where only one is; where both are infinite they count as equal."""
    values = (first - second).where(first != second, 0.0)
    mean, stderr = float(values.mean()), clustered_stderr(values, num_windows)
    interval = mean_interval(mean, stderr, num_windows)
    broken_apart = bool(values.isinf().any()) and mean == mean  # one of them has positions that are not finite
    apart = broken_apart if interval is None else not interval[0] <= 0 <= interval[1]
    return PairedDifference(mean=mean, stderr=stderr, interval=interval, distinguishable=apart)
