"""aphroquant pipeline: carry a recipe out, in steps that are done again only if their inputs have changed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aphroquant.cli.convert import conversion_progress, removing_on_sigterm
from aphroquant.conversion.progress import Progress
from aphroquant.errors import AphroquantError, UsageError

if TYPE_CHECKING:
    from aphroquant.pipeline.result import PipelineResult, StepResult
    from aphroquant.recipes.loading import LoadedRecipe

_SECONDS_BETWEEN_LINES = 30.0


@click.group(name="pipeline", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Plan, convert, verify, evaluate, gate, report and publish, as a recipe says."""


@command.command()
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--job",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What is done so far, the reports and, unless the recipe says otherwise, the outputs. Default: RECIPE.job",
)
@click.option("--source", metavar="SOURCE", help="In place of the recipe's: a directory, .gguf file or Hub id.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="report.json of an earlier release (or eval --json): fail if a figure is worse.",
)
@click.option(
    "--max-regression",
    default="5%",
    show_default=True,
    metavar="SHARE",
    help="How much worse than the baseline: of mean and p99 KL divergence, changed top-1 tokens and bytes.",
)
@click.option("--no-publish", is_flag=True, help="Leave the recipe's publish targets out.")
def run(
    recipe: str, job: Path | None, source: str | None, baseline: Path | None, max_regression: str, no_publish: bool
) -> None:
    """Carry out RECIPE, a file or the name of a shipped recipe.

    The same command goes on where an earlier run was interrupted, and does only what has changed. It ends with exit
    code 4 if an output missed a gate: everything is written and measured then, and nothing published. The reports are
    in DIR/report: report.json, report.md and junit.xml. On GitHub Actions failures are annotated too.
    """
    from aphroquant.pipeline.gates import share_of
    from aphroquant.pipeline.run import require_gates, run_pipeline
    from aphroquant.recipes.loading import read_recipe
    from aphroquant.reporting.words import duration

    share, loaded = share_of(max_regression), read_recipe(recipe)
    if source is not None:
        loaded = _with_source(loaded, source)
    _use_threads(loaded.recipe.threads)
    log, directory, begun = _Log(), job or Path(f"{loaded.name}.job"), time.monotonic()
    with removing_on_sigterm(), _progress() as progress:
        failed: list[PipelineResult] = []
        try:
            result = run_pipeline(
                loaded,
                directory,
                baseline=baseline,
                max_regression=share,
                publishes=not no_publish,
                progress=progress,
                on_step=log.step,
                on_start=log.start,
                on_failure=failed.append,
            )
        except AphroquantError as error:
            _tell_github_of_failure(error, failed)
            raise
    _tell_github(result)
    verdict = "passed" if result.passed else "FAILED"
    took = duration(time.monotonic() - begun)
    click.echo(
        f"{result.name}: {verdict} after {took}; {len(result.outputs)} outputs; report in {directory / 'report'}"
    )
    require_gates(result)


class _Log:
    """One line a step, on standard error, that reads well in a file."""

    def start(self, name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"{name} ...", err=True)

    def step(self, step: StepResult) -> None:
        seconds = "" if step.status in ("cached", "skipped") else f"{step.seconds:.1f} s"
        words = {"done": "ok", "cached": "unchanged", "failed": "FAILED", "skipped": "skipped"}[step.status]
        click.echo(f"{words:<9}  {seconds:>9}  {step.title:<18}  {step.message}", err=True)


class _Heartbeat(Progress):
    """A line now and then of a long step, for consoles that end what is silent; notes and warnings at once."""

    def __init__(self) -> None:
        self._stage, self._last = "", time.monotonic()

    def stage(self, text: str) -> None:
        self._stage = text

    def block(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            click.echo(f"  {self._stage}: {done}/{total}", err=True)

    def note(self, text: str) -> None:
        click.echo(f"  note: {text}", err=True)

    def warn(self, text: str) -> None:
        click.echo(f"  warning: {text}", err=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Heartbeat()
        return
    with conversion_progress() as bars:
        yield bars


def _tell_github(result: PipelineResult) -> None:
    """Annotations and the step's summary, where there is anyone to read them."""
    from aphroquant.pipeline import github

    try:
        github.write_summary(result)
    except UsageError as error:  # which is no reason to hide what came of the run, or to fail it
        click.echo(f"warning: {error.message}", err=True)
    if github.runs_here():
        for line in github.annotation_lines(result):
            click.echo(line)


def _tell_github_of_failure(error: AphroquantError, failed: Sequence[PipelineResult]) -> None:
    """Of the run as far as it came, or of the error alone if it did not begin."""
    from aphroquant.pipeline import github

    if failed:
        _tell_github(failed[0])
    elif github.runs_here():
        click.echo(github.command("error", "aphroquant pipeline", error.message))


def _with_source(loaded: LoadedRecipe, source: str) -> LoadedRecipe:
    """A path on the command line is relative to where the command is run, not to the recipe."""
    given = str(Path(source).absolute()) if Path(source).exists() and loaded.directory is not None else source
    return loaded._replace(recipe=loaded.recipe.model_copy(update={"source": given}))


def _use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(min(count, os.cpu_count() or 1))
