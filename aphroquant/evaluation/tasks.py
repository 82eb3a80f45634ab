"""Scores of tasks, as lm-evaluation-harness gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task for the candidate and its base. `stderr` are those of the harness; None if it has none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    base_value: float
    base_stderr: float | None
    num_samples: int
    num_fewshot: int | None
    higher_is_better: bool | None

    @property
    def recovery(self) -> float | None:
        """The share of the base's score that the candidate keeps."""
        return self.value / self.base_value if self.base_value else None


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """All scores of a run, and the harness that measured them."""

    harness: str
    limit: int | None
    seconds: float
    scores: tuple[TaskScore, ...]
