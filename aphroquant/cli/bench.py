"""aphroquant bench: how fast things are on this machine. One module a command, bench_NAME.py."""

from __future__ import annotations

import click

from aphroquant.cli.lazy import LazyGroup

COMMANDS = {
    "engine": "Count tokens a second of the whole engine.",
    "kernels": "Time linear layers beside what the memory and the processor allow.",
}


@click.group(
    cls=LazyGroup,
    commands_help=COMMANDS,
    modules={name: f"aphroquant.cli.bench_{name}" for name in COMMANDS},
)
def command() -> None:
    """Measure speed. Results go to standard output; the last line is JSON."""
