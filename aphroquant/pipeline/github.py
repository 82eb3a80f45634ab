"""What GitHub Actions reads: annotations on standard output, and the summary of the step in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from aphroquant.errors import UsageError
from aphroquant.pipeline.markdown import markdown
from aphroquant.pipeline.result import PipelineResult


def runs_here(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def annotation_lines(result: PipelineResult) -> Iterator[str]:
    """A line for every bound that was missed, every step that failed, and everything else to know."""
    for name, check in result.failed_checks:
        told = check.sentence + ("" if check.note is None else f" ({check.note})")
        yield command("error", f"{name} missed a gate", told)
    broken = [step for step in result.steps if step.status == "failed" and step.name != "gate"]
    for step in broken:
        yield command("error", f"{step.title} failed", step.message)
    if result.error is not None and not broken:
        yield command("error", f"{result.name} failed", result.error)
    for name, output in result.outputs.items():
        for warning in output.conversion.get("warnings", ()):
            yield command("warning", name, str(warning))
    for note in result.notes:
        yield command("notice", result.name, note)


def command(level: str, title: str, message: str) -> str:
    """::error title=...::message, escaped as the runner wants it."""
    return f"::{level} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(message)}"


def write_summary(result: PipelineResult, environment: Mapping[str, str] = os.environ) -> None:
    """Add the Markdown report to the step's summary, if there is one."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown(result))
    except OSError as error:
        raise UsageError(f"GITHUB_STEP_SUMMARY={path} cannot be written: {error.strerror or error}") from error


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
