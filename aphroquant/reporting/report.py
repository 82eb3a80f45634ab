"""What a report is made from: candidates with their evaluations, how each was made, and what it took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.pairs import Comparison
from aphroquant.evaluation.result import Evaluation, EvaluationRun
from aphroquant.provenance.records import OutputRecord


@dataclass(frozen=True)
class Step:
    """Something that took time, and the most memory that it took, if that was measured."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ModuleError:
    """The relative squared error of one module's output."""

    layer: int
    module: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model of the report. `errors` are those of its layers where the conversion measured them."""

    name: str
    evaluation: Evaluation
    checks: tuple[GateCheck, ...] = ()
    made_by: str = ""  # format, scheme, solver
    errors: tuple[ModuleError, ...] = ()
    steps: tuple[Step, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All candidates of one base. `steps` are those that served all of them."""

    title: str
    candidates: tuple[Candidate, ...]
    comparisons: tuple[Comparison, ...] = ()
    steps: tuple[Step, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


def candidate(
    name: str,
    evaluation: Evaluation,
    checks: Sequence[GateCheck] = (),
    conversion: Mapping[str, Any] | None = None,
    steps: Sequence[Step] | None = None,
) -> Candidate:
    """A candidate from its evaluation and, if there is one, its aphroquant.json or the JSON of `aphroquant convert`.

    Without `steps` those that the record has are taken. What a record lacks, the report leaves out.
    """
    record = conversion or {}
    described = _mapping(record.get("result")) or record
    parts = (described.get("to"), described.get("scheme"), described.get("solver"))
    return Candidate(
        name=name,
        evaluation=evaluation,
        checks=tuple(checks),
        made_by=", ".join(str(part) for part in parts if part),
        errors=_errors(_mapping(described.get("modules"))),
        steps=tuple(steps) if steps is not None else _steps(record),
        environment=shown(_mapping(record.get("environment"))),
    )


def shown(environment: Mapping[str, Any]) -> dict[str, str]:
    """As text, without what there is none of."""
    return {key: str(value) for key, value in environment.items() if value is not None}


def report_of_run(run: EvaluationRun, checks: Sequence[Sequence[GateCheck]], title: str | None = None) -> Report:
    """The report of `aphroquant eval`: what lies beside each model says how it was made."""
    names = _short_names(run)
    candidates = [
        candidate(names[result.model], result, of_model, conversion=_manifest(Path(result.model)))
        for result, of_model in zip(run.evaluations, checks, strict=True)
    ]
    first = run.evaluations[0]
    default = (
        f"{candidates[0].name} against {first.against}" if len(candidates) == 1 else f"Candidates for {first.against}"
    )
    return Report(
        title=title or default,
        candidates=tuple(candidates),
        comparisons=tuple(renamed(comparison, names) for comparison in run.comparisons),
        steps=(Step("evaluate", first.seconds),),
        environment=dict(first.versions),
    )


def _short_names(run: EvaluationRun) -> dict[str, str]:
    """What each model is called: its directory alone, where that tells all apart."""
    paths = [result.model for result in run.evaluations]
    names = [Path(path).name or path for path in paths]
    return dict(zip(paths, names if len(set(names)) == len(names) else paths, strict=True))


def renamed(comparison: Comparison, names: Mapping[str, str]) -> Comparison:
    """With other names of its two models."""
    better = None if comparison.better is None else names[comparison.better]
    return replace(comparison, first=names[comparison.first], second=names[comparison.second], better=better)


def _manifest(model: Path) -> dict[str, Any] | None:
    """aphroquant.json of a model; None if there is none that can be read: the report then says less."""
    try:
        record = json.loads(OutputRecord(model).manifest_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _errors(modules: Mapping[str, Any]) -> tuple[ModuleError, ...]:
    """Errors by layer and module; experts of one layer count together, by the worst."""
    worst: dict[tuple[int, str], float] = {}
    for name, figures in modules.items():
        error = _mapping(figures).get("relative_error")
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), None)
        if layer is None or isinstance(error, bool) or not isinstance(error, int | float):
            continue
        key = (layer, _role(parts))
        worst[key] = max(worst.get(key, 0.0), float(error))
    return tuple(ModuleError(layer, module, error) for (layer, module), error in sorted(worst.items()))


def _role(parts: Sequence[str]) -> str:
    """The module's own name; of an expert with "experts" before it."""
    return f"experts.{parts[-1]}" if "experts" in parts else parts[-1]


def _steps(record: Mapping[str, Any]) -> tuple[Step, ...]:
    timings = _mapping(record.get("timings"))
    stages = _mapping(timings.get("stages"))
    peak = timings.get("peak_memory_bytes", record.get("peak_memory_bytes"))
    memory = peak if isinstance(peak, int) else None
    total = timings.get("seconds", record.get("seconds"))
    named = [Step(f"convert: {name}", float(value)) for name, value in stages.items() if isinstance(value, int | float)]
    whole = [Step("convert, in all", float(total), memory)] if isinstance(total, int | float) else []
    return (*named, *whole)
