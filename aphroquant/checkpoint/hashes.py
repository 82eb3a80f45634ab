"""SHA-256 of files, computed beside other work: most of what is hashed is still, or already, in the page cache."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from aphroquant.checkpoint.files import opened

_STEP = 2**22  # bytes read at once


class FileRecord(NamedTuple):
    """What a file was, for the manifest."""

    bytes: int
    sha256: str


class FileHashes:
    """Hashes files one after the other in a thread of its own. Use as a context manager; leaving it stops the work."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._records: dict[str, Future[FileRecord]] = {}
        for name, path in (files or {}).items():
            self.add(name, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, name: str, path: Path) -> None:
        """The file must stay where it is until `records` has been asked for."""
        self._records[name] = self._pool.submit(self._record, path)

    def records(self) -> dict[str, FileRecord]:
        """Of every file added so far, once they are done. InputError naming one that cannot be read."""
        return {name: record.result() for name, record in self._records.items()}

    def stop(self) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _record(self, path: Path) -> FileRecord:
        digest, buffer, size = hashlib.sha256(), bytearray(_STEP), 0
        with opened(path) as (file, _):
            while (count := file.readinto(buffer)) and not self._stopped.is_set():
                digest.update(memoryview(buffer)[:count])
                size += count
        return FileRecord(size, digest.hexdigest())


class GrowingFileHash:
    """Hashes a file that is being written, from its beginning, as far as it has been `reached`, in a thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._reached = 0
        self._complete = self._stopped = False
        self._changed = threading.Condition()
        self._error: OSError | MemoryError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reached(self, position: int, *, complete: bool = False) -> None:
        """Everything before `position` is written and stays as it is."""
        with self._changed:
            self._reached, self._complete = max(self._reached, position), complete
            self._changed.notify()

    def record(self, size: int) -> FileRecord:
        """Of the whole file of `size` bytes. What went wrong in the thread is raised here."""
        self.reached(size, complete=True)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return FileRecord(size, self._digest.hexdigest())

    def stop(self) -> None:
        """End the thread, whose descriptor may then be closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._hash()
        except (OSError, MemoryError) as error:  # of a thread; `record` raises it
            self._error = error

    def _hash(self) -> None:
        position, buffer = 0, memoryview(bytearray(_STEP))
        while (reached := self._wait(position)) is not None:
            count = os.preadv(self._descriptor, [buffer[: min(_STEP, reached - position)]], position)
            if count == 0:
                raise OSError("the file is shorter than what was written")
            self._digest.update(buffer[:count])
            position += count

    def _wait(self, position: int) -> int | None:
        """How far there is something to hash after `position`; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached > position or self._complete or self._stopped)
            return None if self._stopped or self._reached <= position else self._reached
