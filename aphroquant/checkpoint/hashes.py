"""SHA-256 of files, computed beside other work: most of what is hashed is still, or already, in the page cache.

With it, in the same pass, the CRC-32 of each tensor in the file: the hash proves that a file is another one, and the
check sums, which cost little beside it, tell where.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
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


class Span(NamedTuple):
    """Where the bytes of one tensor are in a file."""

    begin: int
    nbytes: int


class TensorSums:
    """CRC-32 of tensors, eight hexadecimal digits each, from the bytes of their file, which come in order."""

    def __init__(self, spans: Mapping[str, Span]) -> None:
        self._order = sorted(spans.items(), key=lambda item: item[1])
        self._sums = dict.fromkeys((name for name, _ in self._order), 0)
        self._next = 0  # the first in `_order` that is not complete

    def update(self, position: int, content: memoryview) -> None:
        """The file's bytes from `position` on, which is where the last call ended."""
        end = position + len(content)
        for name, span in self._open(end):
            begin = max(span.begin - position, 0)
            self._sums[name] = zlib.crc32(content[begin : span.begin + span.nbytes - position], self._sums[name])

    def sums(self) -> dict[str, str]:
        return {name: f"{value:08x}" for name, value in self._sums.items()}

    def _open(self, end: int) -> Iterator[tuple[str, Span]]:
        """Those that begin before `end` and were not complete before."""
        while self._next < len(self._order):
            name, span = self._order[self._next]
            if span.begin >= end:
                return
            yield name, span
            if span.begin + span.nbytes > end:
                return
            self._next += 1


class FileDigest:
    """The record of a file, and the check sums of its tensors, from its bytes, which come in order."""

    def __init__(self, tensors: Mapping[str, Span] | None = None) -> None:
        self.position = 0  # of the next byte
        self._sha256 = hashlib.sha256()
        self._tensors = TensorSums(tensors or {})

    def update(self, content: memoryview) -> None:
        self._sha256.update(content)
        self._tensors.update(self.position, content)
        self.position += len(content)

    def record(self) -> FileRecord:
        return FileRecord(self.position, self._sha256.hexdigest())

    def tensor_sums(self) -> dict[str, str]:
        return self._tensors.sums()


class FileHashes:
    """Hashes files one after the other in a thread of its own. Use as a context manager; leaving it stops the work."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._digests: dict[str, FileDigest] = {}
        self._records: dict[str, Future[FileRecord]] = {}
        for name, path in (files or {}).items():
            self.add(name, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, name: str, path: Path, tensors: Mapping[str, Span] | None = None) -> None:
        """The file must stay where it is until `records` has been asked for; `tensors` are those to sum in it."""
        digest = self._digests[name] = FileDigest(tensors)
        self._records[name] = self._pool.submit(self._record, path, digest)

    def add_known(self, name: str, digest: FileDigest) -> None:
        """A file that has been hashed while it was made."""
        self._digests[name], self._records[name] = digest, Future()
        self._records[name].set_result(digest.record())

    def records(self) -> dict[str, FileRecord]:
        """Of every file added so far, once they are done. InputError naming one that cannot be read."""
        return {name: record.result() for name, record in self._records.items()}

    def tensor_sums(self, name: str) -> dict[str, str]:
        """The check sums of a file's tensors, once `records` has been asked for."""
        return self._digests[name].tensor_sums()

    def stop(self) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _record(self, path: Path, digest: FileDigest) -> FileRecord:
        buffer = memoryview(bytearray(_STEP))
        with opened(path) as (file, _):
            while (count := file.readinto(buffer)) and not self._stopped.is_set():
                digest.update(buffer[:count])
        return digest.record()


class GrowingFileHash:
    """Hashes a file that is being written, from its beginning, as far as it has been `reached`, in a thread."""

    def __init__(self, descriptor: int, tensors: Mapping[str, Span] | None = None) -> None:
        self._descriptor = descriptor
        self._digest = FileDigest(tensors)
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
        assert self._digest.position == size
        return self._digest.record()

    def tensor_sums(self) -> dict[str, str]:
        """The check sums of the file's tensors, once `record` has been asked for."""
        return self._digest.tensor_sums()

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
        buffer = memoryview(bytearray(_STEP))
        while (reached := self._wait(position := self._digest.position)) is not None:
            count = os.preadv(self._descriptor, [buffer[: min(_STEP, reached - position)]], position)
            if count == 0:
                raise OSError("the file is shorter than what was written")
            self._digest.update(buffer[:count])

    def _wait(self, position: int) -> int | None:
        """How far there is something to hash after `position`; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached > position or self._complete or self._stopped)
            return None if self._stopped or self._reached <= position else self._reached
