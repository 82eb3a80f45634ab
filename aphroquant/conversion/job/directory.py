"""The directory of one job: who it belongs to, the records in it, and a lock against a second process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from aphroquant.checkpoint.base import read_json
from aphroquant.checkpoint.disk import fsync
from aphroquant.conversion.job.choices import kept_choices
from aphroquant.conversion.job.fingerprint import Fingerprint, difference
from aphroquant.conversion.job.record import (
    Record,
    RecordFile,
    find_records,
    is_whole,
    read_record,
    remove_partial,
    write_record,
)
from aphroquant.errors import InputError, ResourceError, UsageError, is_disk_full, is_out_of_memory

_SETTINGS = "job.json"


def default_job(out: Path) -> Path:
    """Where the job of a conversion into `out` is unless the user says otherwise."""
    target = out.expanduser().resolve()
    return target.parent / f".{target.name}.job"


def remove_abandoned(path: Path) -> None:
    """Remove the default job of an output that is whole now, if one is there and nobody works on it."""
    if (path / _SETTINGS).is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # of another conversion into the same output, whose business it is
        finally:
            os.close(descriptor)


class JobDirectory:
    """Open as long as its process works on it. `named`: the user chose the place, so that nothing there is removed
    unasked. `began_anew` says why records that were there are not used."""

    def __init__(self, path: Path, fingerprint: Fingerprint, *, named: bool) -> None:
        """UsageError if another process has it, or (if named) it belongs to something else."""
        self.path, self._fingerprint, self._named = path.expanduser().resolve(), fingerprint, named
        self.began_anew: str | None = None
        self.decisions: dict[str, Any] = {}
        with self._telling_errors():
            self._lock = self._locked()
        try:
            with self._telling_errors():
                self._take_over()
        except BaseException:
            os.close(self._lock)
            raise

    def records(self, kind: str) -> dict[int, RecordFile]:
        """By number, in order."""
        return {record.number: record for record in find_records(self.path) if record.kind == kind}

    def put(self, kind: str, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Store a record, instead of those of its kind and number."""
        with self._telling_errors():
            before = [record for record in find_records(self.path) if record[:2] == (kind, number)]
            written = write_record(self.path, kind, number, tensors, facts)
            for record in before:
                if record.path != written.path:
                    record.path.unlink(missing_ok=True)

    def take(self, record: RecordFile, into: Mapping[str, Tensor] | None = None) -> Record | None:
        """What a record holds; None, and the file is gone, if it is damaged."""
        if is_whole(record):
            return read_record(record, into)
        record.path.unlink(missing_ok=True)
        return None

    def drop(self, kind: str, chosen: range) -> None:
        """Remove records that are not needed any more."""
        for number, record in self.records(kind).items():
            if number in chosen:
                record.path.unlink(missing_ok=True)

    def decide(self, name: str, value: Any) -> Any:
        """What was decided when the job began: `value`, if it begins now. JSON holds it."""
        if name not in self.decisions:
            self.decisions[name] = value
            self._write_settings()
        return self.decisions[name]

    def release(self) -> bool:
        """Let others have it, and tell whether there is anything to go on from: without, it is removed."""
        kept = self._is_open(self._lock) and bool(find_records(self.path) or any(kept_choices(self.path)))
        if not kept and self._is_open(self._lock):
            self._remove()
        os.close(self._lock)
        return kept

    def finish(self) -> None:
        """Remove all of it: the output is whole."""
        self._remove()

    def _locked(self) -> int:
        """The open directory, which is made if there is none."""
        while True:
            self._check_place()
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise UsageError(
                    f"{self.path}: another process is at work on this conversion",
                    hint="wait for it, or give another --out or --job",
                ) from error
            if self._is_open(descriptor):
                return descriptor
            os.close(descriptor)  # its owner has removed it meanwhile

    def _is_open(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _check_place(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is not a directory", hint="give another --job")
        if not self._named:
            return
        names = {path.name for path in self.path.iterdir()} - {path.name for path in kept_choices(self.path)}
        if names and _SETTINGS not in names:
            raise UsageError(f"{self.path} holds something else than a job", hint="give another --job")

    def _take_over(self) -> None:
        """Use the records there, or begin anew."""
        settings, reason = self._settings()
        if reason is None:
            self.decisions = settings["decisions"]
            remove_partial(self.path)
            return
        if reason:
            if self._named:
                raise UsageError(
                    f"the job {self.path} is of another conversion: {reason}",
                    hint="give another --job, or remove that directory to begin anew",
                )
            self.began_anew = reason
        self._empty()
        self._write_settings()

    def _settings(self) -> tuple[dict[str, Any], str | None]:
        """What job.json holds, and why it cannot be used: nothing to say ("") if there is none."""
        path = self.path / _SETTINGS
        if not path.exists():
            return {}, ""
        try:
            settings = read_json(path)
        except InputError:
            return {}, f"{_SETTINGS} is damaged"
        before = settings.get("fingerprint")
        if not isinstance(before, dict) or not isinstance(settings.get("decisions"), dict):
            return {}, f"{_SETTINGS} is damaged"
        return settings, difference(before, self._fingerprint)

    def _write_settings(self) -> None:
        partial = self.path / f".{_SETTINGS}.partial"
        settings = {"fingerprint": self._fingerprint, "decisions": self.decisions}
        with self._telling_errors():
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            fsync(partial)
            partial.rename(self.path / _SETTINGS)
            fsync(self.path)

    def _empty(self) -> None:
        remove_partial(self.path)
        for record in find_records(self.path):
            record.path.unlink(missing_ok=True)

    def _remove(self) -> None:
        """Only what is a job's: a user's own file in a named directory stays."""
        self._empty()
        for path in (self.path / _SETTINGS, *kept_choices(self.path)):
            path.unlink(missing_ok=True)
        if self._named:
            if not any(self.path.iterdir()):
                self.path.rmdir()
            return
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise ResourceError(
                    f"{self.path}: the disk is full, and the last of the work cannot be kept",
                    hint="free some space; the same command then goes on",
                ) from error
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"{self.path}: cannot be written: {error.strerror or error}", hint="give another --job, or --no-job"
            ) from error
