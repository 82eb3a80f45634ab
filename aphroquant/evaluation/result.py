"""The result of an evaluation: figures, sizes, and the protocol without which they mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aphroquant.evaluation.drift import Drift
from aphroquant.evaluation.noise import NoiseFloor
from aphroquant.evaluation.pairs import Comparison
from aphroquant.evaluation.plain import from_plain, to_plain
from aphroquant.evaluation.size import StoredSize
from aphroquant.evaluation.summary import Summary
from aphroquant.evaluation.tasks import TaskResults
from aphroquant.evaluation.texts import TextSource
from aphroquant.evaluation.worst import WorstToken


@dataclass(frozen=True)
class Protocol:
    """How it was measured. `windows` may be fewer than `requested_windows` of each text where a text is short."""

    texts: tuple[TextSource, ...]
    num_text_tokens: int
    windows: int  # of all texts together
    requested_windows: int
    window_len: int
    scored_tokens: int  # windows * (window_len - 1): the first token of a window follows nothing
    seed: int | None  # None: windows evenly spaced over the text
    vocab_size: int  # tokens compared; padding columns of the head are left out
    dtype: str = "float32"
    bos: bool = False


@dataclass(frozen=True, kw_only=True)
class TextFigures(Summary):
    """The figures of one text alone."""

    text: TextSource
    num_text_tokens: int
    windows: int
    scored_tokens: int

    @property
    def perplexity_ratio(self) -> float:
        return _exponential(self.log_ratio)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Summary):
    """A model measured against its base: the figures of Summary over all texts, sizes, and how it was done.

    `texts` has the figures of each text. `calibrated_on` names texts that the model was calibrated on, and that were
    measured on all the same. `seconds` are those of the whole run, of which other candidates may have been a part.
    """

    model: str
    against: str
    size: StoredSize
    base_size: StoredSize
    protocol: Protocol
    seconds: float
    versions: dict[str, str]
    texts: tuple[TextFigures, ...] = ()
    noise_floor: NoiseFloor | None = None
    worst: tuple[WorstToken, ...] = ()
    calibrated_on: tuple[str, ...] = ()
    drift: Drift | None = None
    tasks: TaskResults | None = None

    @property
    def perplexity_ratio(self) -> float:
        return _exponential(self.log_ratio)

    @property
    def num_bytes(self) -> int:
        return self.size.num_bytes

    @property
    def bits_per_weight(self) -> float:
        return self.size.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. A figure that is not finite becomes None: JSON has no infinity."""
        return {**to_plain(self), "perplexity_ratio": to_plain(self.perplexity_ratio)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """The same from its plain values, or from the JSON of `aphroquant eval`. InputError if it is not one."""
        return from_plain(cls, data, "evaluation")


@dataclass(frozen=True)
class EvaluationRun:
    """Several candidates measured in one run against one base, and every pair of them compared."""

    evaluations: tuple[Evaluation, ...]
    comparisons: tuple[Comparison, ...] = ()

    def with_drift(self, drifts: Sequence[Drift]) -> EvaluationRun:
        """The same run with what `measure_drift` found of each candidate."""
        pairs = zip(self.evaluations, drifts, strict=True)
        return replace(self, evaluations=tuple(replace(result, drift=drift) for result, drift in pairs))

    def with_tasks(self, tasks: Sequence[TaskResults]) -> EvaluationRun:
        """The same run with the scores of each candidate."""
        pairs = zip(self.evaluations, tasks, strict=True)
        return replace(self, evaluations=tuple(replace(result, tasks=scores) for result, scores in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "evaluations": [evaluation.to_dict() for evaluation in self.evaluations],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationRun:
        """The same from its plain values; also from those of a single evaluation."""
        if "evaluations" not in data:
            return cls((Evaluation.from_dict(data),))
        return from_plain(cls, data, "run")


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
