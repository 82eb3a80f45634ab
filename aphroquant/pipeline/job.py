"""A pipeline's directory: which steps are done with which inputs, locked while a run works in it.

`state.json` has a record for each step: the key, a hash of all its inputs, and what it made. A step whose key is the
same, and whose files still are what it made, is not done again. A hash of all records tells whether they were damaged.
`files.json` remembers hashes of files by size and time of change, so that a source of many gigabytes is not hashed in
every run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aphroquant.checkpoint.disk import check_parents, replace_file, telling_disk_errors
from aphroquant.errors import InputError, UsageError
from aphroquant.provenance.verification import sha256_of

_VERSION = 2
_UNFINISHED = ""  # the key of a step that was begun, which no step has
_STATE, _FILES, _LOCK = "state.json", "files.json", "lock"


@dataclass(frozen=True)
class StepRecord:
    """A step that was done: `files` are the SHA-256 of what it made, by path; `found` what it found out."""

    key: str
    seconds: float = 0.0
    files: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


class Job:
    """The directory of one pipeline. Use as a context manager: it is this process's until then."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.expanduser()
        self._lock: int | None = None
        self._steps: dict[str, StepRecord] = {}
        self._hashes: dict[str, list[Any]] = {}

    def __enter__(self) -> Self:
        target = self.directory.resolve()
        check_parents(target)
        if target.exists() and not target.is_dir():
            raise UsageError(f"--job {self.directory} is not a directory")
        if target.is_dir() and any(target.iterdir()) and not (target / _LOCK).exists():
            raise UsageError(
                f"--job {self.directory} has files in it, and is no job of an earlier run",
                hint="give a new or empty directory",
            )
        with telling_disk_errors(target, lambda: 0):
            target.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(target / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._claim(self._lock)
        try:
            self._read()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def done(self, step: str, key: str) -> StepRecord | None:
        """The record of a step, if it was done with the same inputs and what it made is still there."""
        record = self._steps.get(step)
        if record is None or record.key != key:
            return None
        return record if all(self._is(Path(path), sha256) for path, sha256 in record.files.items()) else None

    def made(self, path: Path) -> bool:
        """Whether a step of this job has made something at this path, or below it."""
        place = str(path.resolve())
        files = (file for record in self._steps.values() for file in record.files)
        return any(file == place or file.startswith(f"{place}{os.sep}") for file in files)

    def record(self, step: str, record: StepRecord) -> None:
        """Remember that a step is done."""
        self._steps[step] = record
        self._write()

    def begin(self, step: str, place: Path) -> None:
        """A step is about to be done anew. What is at `place` is this job's from now on, also if the run is killed."""
        self.record(step, StepRecord(_UNFINISHED, files={str(place.resolve()): ""}))

    def sha256(self, path: Path) -> str:
        """Of a file; out of the memory of an earlier run, if size, time and place on the disk are the same."""
        place = path.resolve()
        try:
            stat = place.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._hashes.get(str(place))
        if known is None or known[:-1] != mark:
            self._hashes[str(place)] = known = [*mark, sha256_of(place)]
        return str(known[-1])

    def records_of(self, paths: Iterable[Path]) -> dict[str, str]:
        """SHA-256 by resolved path, for a step's record."""
        return {str(path.resolve()): self.sha256(path) for path in paths}

    def _is(self, path: Path, sha256: str) -> bool:
        return path.is_file() and self.sha256(path) == sha256

    def _claim(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            self._close()
            raise UsageError(
                f"--job {self.directory} is in use by another run (process {holder})",
                hint="wait for it, or give another --job",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _release(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> None:
        """What is damaged is as if it had never been: steps are done again."""
        state, hashes = (_json(self.directory / name) for name in (_STATE, _FILES))
        steps = state.get("steps")
        if state.get("version") == _VERSION and isinstance(steps, dict) and state.get("sha256") == key_of(steps):
            self._steps = {name: StepRecord(**fields) for name, fields in steps.items()}
        self._hashes = {path: known for path, known in hashes.items() if isinstance(known, list) and len(known) == 4}

    def _write(self) -> None:
        steps = json.loads(json.dumps({name: vars(record) for name, record in self._steps.items()}))
        state = {"version": _VERSION, "sha256": key_of(steps), "steps": steps}
        with telling_disk_errors(self.directory, lambda: 0):
            replace_file(self.directory / _FILES, json.dumps(self._hashes).encode())
            replace_file(self.directory / _STATE, json.dumps(state, indent=1).encode())


def key_of(*inputs: Any) -> str:
    """A hash of everything that a step depends on, as JSON can hold it."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # none yet, or written by something else
    return found if isinstance(found, dict) else {}
