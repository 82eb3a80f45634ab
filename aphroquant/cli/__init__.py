"""The command line: one click command a module, imported only when it is run."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from aphroquant.errors import EXIT_INTERRUPTED, AphroquantError

COMMANDS = {
    "convert": "Quantize a checkpoint.",
    "eval": "Measure a quantized model against its base.",
    "inspect": "Show what a checkpoint is made of.",
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "chat": "Talk to a model in the terminal.",
}
_MODULES = {"eval": "evaluate"}  # eval.py would shadow the builtin in its own package


class _LazyGroup(click.Group):
    """Knows all commands' names and help lines, and imports a command's module when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"aphroquant.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="aphroquant")
def cli() -> None:
    """Quantize a Hugging Face checkpoint, prove its quality, and serve it."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a documented code (aphroquant/errors.py)."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        result: Any = cli.main(args=args, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AphroquantError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        return error.exit_code
    except MemoryError:
        click.echo("error: out of memory", err=True)
        return 5
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    return result if isinstance(result, int) else 0
