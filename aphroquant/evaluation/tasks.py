"""Scores of tasks, as lm-evaluation-harness gives them: what to run, what came out, and the way to it.

The harness is an extra (`aphroquant[tasks]`), so that nothing here needs it before a task is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aphroquant.errors import UsageError


@dataclass(frozen=True)
class TaskSettings:
    """Names of the harness's tasks, groups or tags; a directory of further ones; samples of each; examples before each.

    None leaves the number of examples to the task, and takes all of its samples.
    """

    names: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("there is no task to run")
        if self.path is not None and not self.path.is_dir():
            raise UsageError(f"--task-path {self.path} is not a directory")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"task limit = {self.limit} must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"fewshot = {self.num_fewshot} must not be negative")


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


def check_tasks(settings: TaskSettings) -> None:
    """UsageError if lm-evaluation-harness is not installed, or has no such task: found before the work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks need lm-evaluation-harness", hint="pip install 'aphroquant[tasks]'")
    from aphroquant.evaluation.harness import task_index

    task_index(settings)


def measure_tasks(
    models: Sequence[str | Path], *, against: str | Path, settings: TaskSettings, device: str = "auto"
) -> tuple[TaskResults, ...]:
    """The scores of each model and of its base in the harness's tasks."""
    check_tasks(settings)
    from aphroquant.evaluation.harness import run_tasks

    return run_tasks(models, against=against, settings=settings, device=device)
