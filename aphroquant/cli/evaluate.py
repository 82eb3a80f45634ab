"""aphroquant eval: measure quantized models against their base, and fail if one misses a bound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aphroquant.cli.json_report import STANDARD_OUTPUT, check_html_target, check_json_target, write_json
from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.evaluation import Drift, Evaluation, EvaluationRun, GateCheck, TaskSettings
    from aphroquant.evaluation.measure import OnProgress

_STAGES = {"base": "base model", "model": "quantized model", "logits": "comparing logits"}


@click.command()
@click.argument("models", metavar="DIR...", nargs=-1, required=True)
@click.option("--against", metavar="BASE", required=True, help="The model that DIR was made from.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text to measure on; repeatable: each has its own windows, figures and gates. Default: bundled text.",
)
@click.option("--windows", default=8, show_default=True, help="Windows of each text, evenly spaced over it.")
@click.option("--window-len", default=1024, show_default=True, help="Tokens in a window.")
@click.option("--seed", type=int, help="Draw the windows at random instead of evenly spaced.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="What computes; auto is a GPU if there is one.",
)
@click.option(
    "--noise-floor/--no-noise-floor",
    default=True,
    show_default=True,
    help="Measure what bfloat16 activations alone change in the base.",
)
@click.option("--allow-calibration-text", is_flag=True, help="Measure also on a text that DIR was calibrated on.")
@click.option("--json", "json_file", metavar="FILE", help="Write all figures here; - for standard output.")
@click.option("--record", is_flag=True, help="Write the figures into DIR: aphroquant.json, model card, check sums.")
@click.option("--html", "html_file", metavar="FILE", help="Write a report with plots here: one page, for any browser.")
@click.option("--drift", is_flag=True, help="Also compare greedy answers: where each first differs from the base's.")
@click.option("--drift-tokens", default=128, show_default=True, help="Tokens of each answer.")
@click.option(
    "--tasks", metavar="NAME,...", help="Also run tasks of lm-evaluation-harness (pip install 'aphroquant[tasks]')."
)
@click.option("--task-path", metavar="DIR", type=click.Path(path_type=Path), help="Directory of further tasks.")
@click.option("--task-limit", type=int, metavar="N", help="Samples of each task. Default: all.")
@click.option("--fewshot", type=int, metavar="N", help="Examples before each sample. Default: by task.")
@click.option("--max-kld", type=float, help="Fail (exit 4) above this mean KL divergence, in nats.")
@click.option("--max-p99-kld", type=float, help="Fail above this 99th percentile of it.")
@click.option("--max-p999-kld", type=float, help="Fail above this 99.9th percentile of it.")
@click.option("--min-top1", type=float, help="Fail below this share (0 to 1) of equal most likely tokens.")
@click.option("--max-ppl-ratio", type=float, help="Fail above this perplexity, as a multiple of the base's.")
def command(
    models: tuple[str, ...],
    against: str,
    texts: tuple[str, ...],
    windows: int,
    window_len: int,
    seed: int | None,
    device: str,
    noise_floor: bool,
    allow_calibration_text: bool,
    json_file: str | None,
    record: bool,
    html_file: str | None,
    drift: bool,
    drift_tokens: int,
    tasks: str | None,
    task_path: Path | None,
    task_limit: int | None,
    fewshot: int | None,
    **bounds: float | None,
) -> None:
    """Measure the model in each DIR against BASE: KL divergence, top-1 agreement, perplexity, size.

    All read the same windows of text, teacher-forced, in float32. Several models are also compared with each other,
    position by position. Any bound (--max-..., --min-...) makes the command a gate: it ends with exit code 4 if a
    result misses one, after the tables and files were written.
    """
    check_json_target(json_file)
    check_html_target(html_file)
    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.evaluation import Bounds, check_bounds, evaluate_models, measure_tasks
    from aphroquant.evaluation.drift import check_drift
    from aphroquant.evaluation.gate import require_all
    from aphroquant.provenance.metrics import check_recordable, record_evaluation

    for model in models if record else ():
        check_recordable(model)  # found before the work
    limits = Bounds(**bounds)
    settings = _task_settings(tasks, task_path, task_limit, fewshot)
    if drift:
        check_drift(open_checkpoint(against), drift_tokens)
    with _progress(_stages(len(models))) as on_progress:
        run = evaluate_models(
            models,
            against=against,
            texts=texts,
            windows=windows,
            window_len=window_len,
            seed=seed,
            device=device,
            on_progress=on_progress,
            with_floor=noise_floor,
            allow_calibration_text=allow_calibration_text,
        )
    if drift:
        run = run.with_drift(_drift(models, against, texts, drift_tokens, device))
    if settings is not None:
        run = run.with_tasks(measure_tasks(models, against=against, settings=settings, device=device))
    checks = [check_bounds(result, limits) for result in run.evaluations]
    if json_file != STANDARD_OUTPUT:
        _show(run, checks)
    if json_file is not None:
        write_json(json_file, _record(run, checks))
    for result in run.evaluations if record else ():
        record_evaluation(result.model, result.to_dict())
    if html_file is not None:
        from aphroquant.reporting import report_of_run, write_report

        write_report(html_file, report_of_run(run, checks))
    names = models if len(models) > 1 else ("",)
    require_all(dict(zip(names, checks, strict=True)))


def _task_settings(tasks: str | None, path: Path | None, limit: int | None, fewshot: int | None) -> TaskSettings | None:
    """The tasks of a list with commas, each certain to exist. UsageError for what says how to run them without one."""
    if tasks is None:
        for option, value in (("--task-path", path), ("--task-limit", limit), ("--fewshot", fewshot)):
            if value is not None:
                raise UsageError(f"{option} {value} is for tasks, and none is asked for", hint="name them with --tasks")
        return None
    from aphroquant.evaluation.tasks import TaskSettings, check_tasks

    settings = TaskSettings(tuple(name.strip() for name in tasks.split(",") if name.strip()), path, limit, fewshot)
    check_tasks(settings)
    return settings


def _drift(
    models: tuple[str, ...], against: str, texts: tuple[str, ...], max_tokens: int, device: str
) -> tuple[Drift, ...]:
    from aphroquant.evaluation import measure_drift

    with _progress(_drift_stages(len(models))) as on_progress:
        return measure_drift(
            models, against=against, texts=texts, max_tokens=max_tokens, device=device, on_progress=on_progress
        )


def _show(run: EvaluationRun, checks: Sequence[Sequence[GateCheck]]) -> None:
    from aphroquant.evaluation.report import comparison_table, comparison_text, plain_text, table

    console = Console()
    several = len(run.evaluations) > 1
    for result, of_model in zip(run.evaluations, checks, strict=True):
        if console.is_terminal:
            console.print(table(result, of_model))
        else:
            click.echo((f"{result.model}\n\n" if several else "") + plain_text(result, of_model) + "\n" * several)
    if run.comparisons and console.is_terminal:
        console.print(comparison_table(run.comparisons))
    elif run.comparisons:
        click.echo(comparison_text(run.comparisons))


def _record(run: EvaluationRun, checks: Sequence[Sequence[GateCheck]]) -> dict[str, Any]:
    """All figures: of one model by themselves, of several as a list; `gate` lists every check, `passed` the verdict."""
    records = [_gated(result, of_model) for result, of_model in zip(run.evaluations, checks, strict=True)]
    if len(records) == 1:
        return records[0]
    return {**run.to_dict(), "evaluations": records, "passed": all(record["passed"] for record in records)}


def _gated(result: Evaluation, checks: Sequence[GateCheck]) -> dict[str, Any]:
    record = result.to_dict()
    record["gate"] = [check.to_dict() for check in checks]
    record["passed"] = all(check.passed for check in checks)
    return record


@contextmanager
def _progress(stages: Mapping[str, str]) -> Iterator[OnProgress]:
    """A callback that draws bars on a terminal, and elsewhere writes one line a finished stage; on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(stages)
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bars:
        tasks = {stage: bars.add_task(label, total=None, start=False) for stage, label in stages.items()}

        def update(stage: str, done: int, total: int) -> None:
            bars.start_task(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _stages(num_models: int) -> dict[str, str]:
    """The stages in turn, as evaluate_models names them, and what they are called here."""
    if num_models == 1:
        return _STAGES
    models = {f"model {number}": f"quantized model {number}" for number in range(1, num_models + 1)}
    return {"base": _STAGES["base"], **models, "logits": _STAGES["logits"]}


def _drift_stages(num_models: int) -> dict[str, str]:
    """The same of `measure_drift`."""
    models = [stage for stage in _stages(num_models) if stage.startswith("model")]
    return {"base": "base's answers"} | {
        stage: "answers" if len(models) == 1 else f"answers {number}" for number, stage in enumerate(models, 1)
    }


def _plain_lines(stages: Mapping[str, str]) -> OnProgress:
    started = time.monotonic()

    def update(stage: str, done: int, total: int) -> None:
        if done == total:
            click.echo(f"{stages[stage]}: done after {time.monotonic() - started:.0f} s", err=True)

    return update
