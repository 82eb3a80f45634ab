"""What came of a pipeline: every step, every output, every check."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aphroquant.evaluation.gate import GateCheck

Status = Literal["done", "cached", "failed", "skipped"]


@dataclass(frozen=True)
class StepResult:
    """One step, of one output or of all. `message` is a sentence for people. The memory is None if it is not known."""

    name: str
    status: Status
    seconds: float
    message: str
    output: str | None = None
    peak_memory_bytes: int | None = None

    @property
    def title(self) -> str:
        return self.name if self.output is None else f"{self.name} {self.output}"


@dataclass
class OutputResult:
    """An output as far as it has come. `planned` is what the plan said of it, engines that load it included."""

    name: str
    place: Path
    to: str
    planned: dict[str, Any]
    conversion: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    checks: list[GateCheck] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "place": str(self.place),
            "to": self.to,
            "planned": self.planned,
            "conversion": self.conversion,
            "evaluation": self.evaluation,
            "gate": [check.to_dict() for check in self.checks],
            "passed": self.passed,
        }


@dataclass
class PipelineResult:
    """All of it. `error` is what a step ended with, if one did; gates that were missed are no error."""

    name: str
    source: str
    recipe: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[StepResult] = field(default_factory=list)
    outputs: dict[str, OutputResult] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def failed_checks(self) -> list[tuple[str, GateCheck]]:
        """(output, check) of every bound that was missed."""
        return [(name, check) for name, output in self.outputs.items() for check in output.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return self.error is None and not self.failed_checks

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps if step.status != "cached")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "passed": self.passed,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "steps": [vars(step) for step in self.steps],
            "outputs": {name: output.to_dict() for name, output in self.outputs.items()},
            "comparisons": self.comparisons,
            "published": self.published,
            "notes": self.notes,
            "recipe": self.recipe,
            "environment": self.environment,
        }
