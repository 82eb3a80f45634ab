"""aphroquant eval: measure a quantized model against its base, and fail if it misses a bound."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json

if TYPE_CHECKING:
    from aphroquant.evaluation import Evaluation, GateCheck
    from aphroquant.evaluation.compare import OnProgress

_STAGES = {"base": "base model", "model": "quantized model", "logits": "comparing logits"}


@click.command()
@click.argument("model", metavar="DIR")
@click.option("--against", metavar="BASE", required=True, help="The model that DIR was made from.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text to measure on; repeatable. Default: bundled text.",
)
@click.option("--windows", default=8, show_default=True, help="Windows of tokens, evenly spaced over the text.")
@click.option("--window-len", default=1024, show_default=True, help="Tokens in a window.")
@click.option("--seed", type=int, help="Draw the windows at random instead of evenly spaced.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="What computes; auto is a GPU if there is one.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write all figures here; - for standard output.")
@click.option("--max-kld", type=float, help="Fail (exit 4) above this mean KL divergence, in nats.")
@click.option("--max-p99-kld", type=float, help="Fail above this 99th percentile of it.")
@click.option("--max-p999-kld", type=float, help="Fail above this 99.9th percentile of it.")
@click.option("--min-top1", type=float, help="Fail below this share (0 to 1) of equal most likely tokens.")
@click.option("--max-ppl-ratio", type=float, help="Fail above this perplexity, as a multiple of the base's.")
def command(
    model: str,
    against: str,
    texts: tuple[str, ...],
    windows: int,
    window_len: int,
    seed: int | None,
    device: str,
    json_file: str | None,
    **bounds: float | None,
) -> None:
    """Measure the model in DIR against BASE: KL divergence, top-1 agreement, perplexity, size.

    Both read the same windows of text, teacher-forced, in float32. Any bound (--max-..., --min-...) makes the command
    a gate: it ends with exit code 4 if the result misses one, after the table and the JSON file were written.
    """
    check_json_target(json_file)
    from aphroquant.evaluation import Bounds, check_bounds, evaluate
    from aphroquant.evaluation.gate import require

    limits = Bounds(**bounds)
    with _progress() as on_progress:
        result = evaluate(
            model,
            against=against,
            texts=texts,
            windows=windows,
            window_len=window_len,
            seed=seed,
            device=device,
            on_progress=on_progress,
        )
    checks = check_bounds(result, limits)
    if json_file != STANDARD_OUTPUT:
        _show(result, checks)
    if json_file is not None:
        write_json(json_file, _record(result, checks))
    require(checks)


def _show(result: Evaluation, checks: list[GateCheck]) -> None:
    from aphroquant.evaluation.report import plain_text, table

    console = Console()
    if console.is_terminal:
        console.print(table(result, checks))
    else:
        click.echo(plain_text(result, checks))


def _record(result: Evaluation, checks: list[GateCheck]) -> dict[str, Any]:
    """All figures; `gate` lists every check and `passed` is the verdict."""
    record = result.to_dict()
    record["gate"] = [check.to_dict() for check in checks]
    record["passed"] = all(check.passed for check in checks)
    return record


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A callback that draws bars on a terminal, and elsewhere writes one line a finished stage; on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines()
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bars:
        tasks = {stage: bars.add_task(label, total=None, start=False) for stage, label in _STAGES.items()}

        def update(stage: str, done: int, total: int) -> None:
            bars.start_task(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _plain_lines() -> OnProgress:
    started = time.monotonic()

    def update(stage: str, done: int, total: int) -> None:
        if done == total:
            click.echo(f"{_STAGES[stage]}: done after {time.monotonic() - started:.0f} s", err=True)

    return update
