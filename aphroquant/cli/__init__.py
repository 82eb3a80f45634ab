"""The command line: one click command a module, imported only when it is run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from aphroquant.cli.lazy import LazyGroup
from aphroquant.errors import (
    EXIT_INTERRUPTED,
    AphroquantError,
    ResourceError,
    UsageError,
    is_disk_full,
    is_out_of_memory,
    out_of_memory,
)

COMMANDS = {
    "convert": "Quantize a checkpoint.",
    "plan": "Say what a conversion will give and take.",
    "recipe": "Write, check and show recipes.",
    "pipeline": "Convert, verify, measure, gate, report and publish by a recipe.",
    "eval": "Measure a quantized model against its base.",
    "inspect": "Show what a checkpoint is made of.",
    "verify": "Check that the files of an output are those that were written.",
    "reproduce": "Make an output again and compare the bytes.",
    "sign": "Sign an output.",
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "chat": "Talk to a model in the terminal.",
    "bench": "Measure speed on this machine.",
    "doctor": "Show what is usable here, and test each kernel.",
}
_MODULES = {"eval": "evaluate"}  # eval.py would shadow the builtin in its own package


@click.group(
    cls=LazyGroup,
    commands_help=COMMANDS,
    modules={name: f"aphroquant.cli.{_MODULES.get(name, name)}" for name in COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
        return _told(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        if is_disk_full(error):
            return _told_of_full_disk()
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _told(UsageError(f"{str(error.filename)[:60]}... is too long for the name of a file"))
        if not is_out_of_memory(error):
            raise
        return _told(out_of_memory())
    return result if isinstance(result, int) else 0


def _told_of_full_disk() -> int:
    """The exit code where what is written by the way, such as standard output, finds no room."""
    try:
        sys.stdout.flush()
    except OSError:  # it would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _told(ResourceError("the disk is full", hint="free some space, or send the output elsewhere"))


def _told(error: AphroquantError) -> int:
    """The exit code of an error that is now on stderr."""
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code
