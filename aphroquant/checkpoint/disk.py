"""Writing to disk so that errors are the user's own words, and what is written stays written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aphroquant.errors import ResourceError, UsageError, is_disk_full, is_out_of_memory


@contextmanager
def telling_disk_errors(target: Path, written: Callable[[], int]) -> Iterator[None]:
    """Errors of the file system as the user's: a full disk, or a place that cannot be written.

    `written` gives the bytes of tensors so far, for the message.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{target}: the disk is full after {size_text(written())} of tensors",
                hint="free some space or give another --out; no part of the output was left",
            ) from error
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{target}: cannot be written: {error.strerror or error}") from error


def check_parents(target: Path) -> None:
    """UsageError if something stands above a path that is no directory, so that it cannot be made."""
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"{target} cannot be made: {above} is not a directory", hint="give another --out")


def size_text(num_bytes: float) -> str:
    """Bytes in a unit that fits, so that little space is not told as 0.00 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file that is whole as soon as it has its name."""
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.write_bytes(content)
        fsync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
