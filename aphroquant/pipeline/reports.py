"""A pipeline's reports: JSON for programs, Markdown for people, JUnit for CI systems, HTML with plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from aphroquant.checkpoint.disk import replace_file, telling_disk_errors
from aphroquant.evaluation.pairs import Comparison
from aphroquant.evaluation.result import Evaluation
from aphroquant.pipeline.junit import junit
from aphroquant.pipeline.markdown import markdown
from aphroquant.pipeline.result import PipelineResult
from aphroquant.provenance.records import OutputRecord
from aphroquant.recipes.loading import LoadedRecipe
from aphroquant.recipes.requests import resolved
from aphroquant.reporting import Report, Step, candidate, render
from aphroquant.reporting.report import shown


def json_report(result: PipelineResult) -> str:
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"


def html_report(result: PipelineResult) -> str | None:
    """The page about all outputs that were measured; None if none was."""
    measured = {
        name: candidate(
            name,
            Evaluation.from_dict(output.evaluation),
            output.checks,
            OutputRecord(output.place).manifest,
            steps=(),
        )
        for name, output in result.outputs.items()
        if output.evaluation is not None
    }
    if not measured:
        return None
    page = Report(
        title=f"{result.name}: {result.source}",
        candidates=tuple(measured.values()),
        comparisons=tuple(map(Comparison.from_dict, result.comparisons)),
        steps=tuple(
            Step(step.title, step.seconds, step.peak_memory_bytes) for step in result.steps if step.status == "done"
        ),
        environment=shown(result.environment),
    )
    return render(page)


_KINDS: Mapping[str, tuple[str, Callable[[PipelineResult], str | None]]] = {
    "json_file": ("report.json", json_report),
    "markdown": ("report.md", markdown),
    "junit": ("junit.xml", junit),
    "html": ("report.html", html_report),
}


def write_reports(result: PipelineResult, job: Path, loaded: LoadedRecipe) -> None:
    """All of them into the job's folder `report`, and copies where the recipe wants them."""
    folder = job / "report"
    for setting, (name, made) in _KINDS.items():
        content = made(result)
        copy = getattr(loaded.recipe.report, setting)
        for path in [folder / name, *([resolved(copy, loaded.directory)] if copy is not None else [])]:
            with telling_disk_errors(path, lambda: 0):
                path.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    path.unlink(missing_ok=True)  # an earlier run's
                else:
                    replace_file(path, content.encode())
