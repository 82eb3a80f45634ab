"""SHA-256 of files that are read anyway: tensors are hashed as they come by, and only what is left is read for it.

A hash goes through a file in order, and a conversion mostly does. What comes out of order, or is known to come late, is
read here when its turn is there. Whoever reads waits in the end until its bytes are hashed, so that nobody changes them
before; and a turn is given to what has begun to be read, so that nobody waits for ever. Who would wait long, as the
embedding stands in front of the layers and comes late, does not: then the hash goes on alone until it is near.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from aphroquant.checkpoint.direct import aligned
from aphroquant.checkpoint.files import opened
from aphroquant.checkpoint.hashes import FileDigest, FileRecord
from aphroquant.errors import InputError
from aphroquant.prefetch import prefetched

_STEP = 2**22  # bytes read at once
_SHORT_GAP = 2**26  # a range behind a gap larger than this, and than itself, is out of order
_NEAR = 2**28  # bytes that a reader waits for to be hashed

Range = tuple[int, int]  # of a file: from, to


class SourceHashes:
    """Hashes files while this is entered. `late` has those that will be read from, each with the ranges that come after
    all others."""

    def __init__(self, files: Mapping[str, Path], late: Mapping[Path, Sequence[Range]]) -> None:
        self._files = {name: _File(path, late.get(path, ())) for name, path in files.items()}
        self._by_path = {file.path: file for file in self._files.values() if file.path in late}
        self._before: deque[_File] = deque(maxlen=2)  # that were read from
        self._lock = threading.Lock()
        self._following = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing")
        self._finishing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing the rest")

    def __enter__(self) -> Self:
        _ACTIVE.append(self)
        for file in self._files.values():
            if file.path not in self._by_path:
                self._close(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _ACTIVE.remove(self)
        with self._lock:
            for file in self._files.values():
                file.stopped.set()
        self._following.shutdown(cancel_futures=True)
        self._finishing.shutdown(cancel_futures=True)

    def records(self) -> dict[str, FileRecord]:
        """Of all files, once they are done. InputError naming one that cannot be read."""
        with self._lock:
            futures = {name: self._close(file) for name, file in self._files.items()}
        return {name: future.result() for name, future in futures.items()}

    def begin(self, path: Path, begin: int, nbytes: int) -> Reading | None:
        """Say that this range is about to be read; None if it may be read again."""
        file = self._by_path.get(path)
        if file is None:
            return None
        with self._lock:
            self._close_earlier(file)
            if file.record is None and not file.stopped.is_set() and file.gap_before(begin) <= max(_SHORT_GAP, nbytes):
                return self._followed(file, begin, begin + nbytes)
            return Reading() if file.is_late(begin, begin + nbytes) else None

    def _followed(self, file: _File, begin: int, end: int) -> Reading | None:
        """What is next in the file is hashed up to `end`: as it is read, if the hash is near."""
        file.planned = end
        if begin - file.position > _NEAR:
            file.followed.append(self._following.submit(file.go_on, end))
            return None
        parts: SimpleQueue[memoryview | None] = SimpleQueue()
        file.followed.append(self._following.submit(file.follow, begin, end, parts))
        return HashedReading(parts, file.followed[-1])

    def _close_earlier(self, file: _File) -> None:
        """From the file before the last one hardly anything will be read any more."""
        if file in self._before:
            return
        if len(self._before) == self._before.maxlen:
            self._close(self._before[0])
        self._before.append(file)

    def _close(self, file: _File) -> Future[FileRecord]:
        if file.record is None:
            file.record = self._finishing.submit(file.finish)
        return file.record


class Reading:
    """A range that is being read, once."""

    def came(self, part: memoryview) -> None:
        """The next bytes, which stay as they are until the end."""

    def end(self) -> None:
        """From now on they may change."""


class HashedReading(Reading):
    """One that is hashed as it comes."""

    def __init__(self, parts: SimpleQueue[memoryview | None], hashed: Future[None]) -> None:
        self._parts, self._hashed = parts, hashed

    def came(self, part: memoryview) -> None:
        self._parts.put(part)

    def end(self) -> None:
        self._parts.put(None)
        wait([self._hashed])


class _File:
    """How far a file is hashed, by one thread at a time, and how far that is planned."""

    def __init__(self, path: Path, late: Sequence[Range]) -> None:
        self.path = path
        self.planned = 0
        self.followed: list[Future[None]] = []
        self.record: Future[FileRecord] | None = None
        self.stopped = threading.Event()
        self._late = sorted(late)
        self._digest = FileDigest()
        self._buffers = deque(aligned(_STEP).numpy().data for _ in range(2))  # pages of which are made when touched

    @property
    def position(self) -> int:
        """Up to where it is hashed."""
        return self._digest.position

    def is_late(self, begin: int, end: int) -> bool:
        """Whether a range is among those that come late."""
        return any(start <= begin and end <= stop for start, stop in self._late)

    def gap_before(self, begin: int) -> float:
        """Bytes between the plan's end and `begin`, but for those that come late; infinite if that is behind."""
        if begin < self.planned:
            return float("inf")
        late = (min(end, begin) - max(start, self.planned) for start, end in self._late)
        return begin - self.planned - sum(part for part in late if part > 0)

    def follow(self, begin: int, end: int, parts: SimpleQueue[memoryview | None]) -> None:
        """Hash up to `end`: what is before `begin` as this reads it, the rest from `parts`, as far as they go."""
        self.go_on(begin)
        while (part := parts.get()) is not None:
            self._digest.update(part)
        self.go_on(end)

    def finish(self) -> FileRecord:
        for each in self.followed:
            each.result()
        self.go_on(None)
        self._buffers.clear()
        return self._digest.record()

    def go_on(self, end: int | None) -> None:
        """Read, and hash, up to `end`, or to the file's."""
        if self.position == end:
            return
        with closing(self._parts(self.position, end)) as parts:
            short = end is not None and end - self.position <= _STEP
            with closing(parts if short else prefetched(parts)) as coming:
                for part in coming:
                    self._digest.update(part)

    def _parts(self, position: int, end: int | None) -> Generator[memoryview, None, None]:
        """The bytes from `position` on; each part stays as it is until the one after the next is asked for.

        They stay in the page cache: others read them before or after this, and the disk is slower than any of them.
        """
        buffers = self._buffers
        with opened(self.path) as (file, _):
            while (end is None or position < end) and not self.stopped.is_set():
                wanted = _STEP if end is None else min(_STEP, end - position)
                count = os.preadv(file.fileno(), [buffers[0][:wanted]], position)
                if not count and end is not None:
                    raise InputError(f"{self.path}: the file has become shorter while it was read")
                if not count:
                    return
                yield buffers[0][:count]
                position += count
                buffers.rotate()


_ACTIVE: list[SourceHashes] = []


@contextmanager
def following(path: Path, begin: int, nbytes: int) -> Iterator[Reading | None]:
    """While a range of a file is read: where to tell what has come, or None if it may be read again."""
    found = (hashes.begin(path, begin, nbytes) for hashes in list(_ACTIVE))
    reading = next((each for each in found if each is not None), None)
    try:
        yield reading
    finally:
        if reading is not None:
            reading.end()
