"""Where --json and --html go: a file, or for JSON standard output in place of the text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from aphroquant.errors import ResourceError, UsageError, is_disk_full

STANDARD_OUTPUT = "-"


def check_json_target(target: str | None) -> None:
    """UsageError if a report could not be written there: found before the work, not after it."""
    if target != STANDARD_OUTPUT:
        _check_file("--json", target)


def check_html_target(target: str | None) -> None:
    """The same of a page, which is always a file."""
    if target == STANDARD_OUTPUT:
        raise UsageError("--html needs the name of a file; standard output is for --json")
    _check_file("--html", target)


def _check_file(option: str, target: str | None) -> None:
    if target is None:
        return
    path = Path(target)
    if path.is_dir():
        raise UsageError(f"{option} {target} is a directory; give a file name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {target}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"{option} {target} is not writable")


def write_json(target: str, report: dict[str, Any]) -> None:
    """Write the report, as strict JSON."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    if not text.replace("\n", "").isprintable():  # half characters, and what terminals take for commands
        text = json.dumps(report, indent=2, allow_nan=False)
    if target == STANDARD_OUTPUT:
        click.echo(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(f"--json {target}: the disk is full", hint="free some space or name another") from error
        raise UsageError(f"--json {target} cannot be written: {error.strerror or error}") from error
