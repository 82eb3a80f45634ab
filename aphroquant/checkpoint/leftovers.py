"""What is left of writers that were killed: `.NAME.partial-PID` beside NAME, found and removed by the next of its name.

A writer holds a lock on its partial file or directory for as long as it lives. So a leftover is one that nobody has
locked, and whose process is gone: the process is looked for as well, since a lock is taken a moment after the making.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from pathlib import Path

from aphroquant.errors import UsageError

PARTIAL, REPLACED = "partial", "replaced"


def partial_path(target: Path) -> Path:
    """Where this process writes what will be `target`."""
    return _beside(target, PARTIAL)


def replaced_path(target: Path) -> Path:
    """Where this process puts the old `target` while the new one takes its place."""
    return _beside(target, REPLACED)


def claim(descriptor: int, target: Path) -> None:
    """Lock the open partial file or directory. UsageError if another process is writing to it."""
    if not _lock(descriptor):
        raise UsageError(f"{target} is being written by another process", hint="wait for it, or give another --out")


def remove_leftovers(target: Path) -> list[str]:
    """Remove what dead writers of `target` left, and say it: one line for each. An old `target` that a killed writer
    had put aside takes its place again if there is no other."""
    said = []
    for path in _abandoned(target, REPLACED):
        if target.exists():
            _remove(path)
        else:
            path.rename(target)
            said.append(f"put {target.name} back, which a killed conversion had renamed to {path.name}")
    for path in _abandoned(target, PARTIAL):
        _remove(path)
        said.append(f"removed {path.name}, left by a conversion that was killed")
    return said


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{os.getpid()}"


def _abandoned(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    found = []
    for path in sorted(target.parent.glob(f"{glob.escape(prefix)}*")):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and not path.is_symlink() and _is_dead(int(number)) and _is_unlocked(path):
            found.append(path)
    return found


def _is_dead(process: int) -> bool:
    """Whether there is no such process, or it is this one, whose number has come round again."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _is_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # of another user, or gone meanwhile
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
