"""How far a command is that goes once through files: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OnProgress = Callable[[int, int], None]  # done, in all
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def stage_progress(what: str, unit: str, scale: float) -> Iterator[OnProgress]:
    """A callback for what is being done, told in `unit`, of which one is `scale` of what the callback is given."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(what, unit, scale)
        return
    columns = (TextColumn(f"{what} ({unit})"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=int(done / scale), total=int(total / scale))


def _plain_lines(what: str, unit: str, scale: float) -> OnProgress:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            click.echo(f"{what}: {done / scale:,.0f} of {total / scale:,.0f} {unit}", err=True)

    return update
