"""A pipeline's reports: JSON for programs, Markdown for people, JUnit for CI systems, HTML with plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from aphroquant.checkpoint.disk import replace_file, telling_disk_errors
from aphroquant.pipeline.junit import junit
from aphroquant.pipeline.markdown import markdown
from aphroquant.pipeline.result import PipelineResult
from aphroquant.recipes.loading import LoadedRecipe
from aphroquant.recipes.requests import resolved


def json_report(result: PipelineResult) -> str:
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"


_KINDS: Mapping[str, tuple[str, Callable[[PipelineResult], str]]] = {
    "json_file": ("report.json", json_report),
    "markdown": ("report.md", markdown),
    "junit": ("junit.xml", junit),
}


def write_reports(result: PipelineResult, job: Path, loaded: LoadedRecipe) -> None:
    """All of them into the job's folder `report`, and copies where the recipe wants them."""
    folder = job / "report"
    for setting, (name, made) in _KINDS.items():
        content = made(result).encode()
        copy = getattr(loaded.recipe.report, setting)
        for path in [folder / name, *([resolved(copy, loaded.directory)] if copy is not None else [])]:
            with telling_disk_errors(path, lambda: 0):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, content)
