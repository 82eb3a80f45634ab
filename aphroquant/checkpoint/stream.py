"""A file written in order, past the page cache: each chunk goes to the disk, is read back from there and compared, and
is hashed on the way, in threads beside the work that makes the next.

Filling the page cache cost more than all arithmetic of a conversion: 1.5 CPU seconds a GB and 0.3 GB/s where O_DIRECT
takes 0.15 with reading back, at 0.8 (ext4 on a virtual disk, Linux 6.18). A file system that refuses it is written, and
read back, through the cache.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from aphroquant.checkpoint.direct import ALIGNMENT, aligned, set_direct
from aphroquant.checkpoint.hashes import FileDigest
from aphroquant.checkpoint.tensor_io import check_same, content_of, write_all

CHUNK = 2**22  # bytes written at once
_CHUNKS = 16  # in memory, most of them on their way to the disk
_WORKERS = 6  # which wait for the disk


class OutputStream:
    """Bytes are appended to an open file from an aligned `position` on; `finish` comes back when all are written.

    A `digest` that has seen what stands in front of them sees them too. What goes wrong in a thread is raised by the
    next call: OSError, or ResourceError if something else is read back than was written.
    """

    def __init__(self, descriptor: int, path: Path, position: int, *, digest: FileDigest | None = None) -> None:
        assert position % ALIGNMENT == 0
        self.digest = digest
        self._descriptor, self._path = descriptor, path
        self._begin = position  # of the chunk that is being filled
        self._filled = 0
        self._chunk = aligned(CHUNK)
        self._free = [aligned(CHUNK) for _ in range(_CHUNKS - 1)]
        self._under_way: deque[tuple[Tensor, list[Future[None]]]] = deque()
        self._storing = ThreadPoolExecutor(max_workers=_WORKERS, thread_name_prefix="storing")
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing")
        self._again = threading.local()  # where each thread reads back
        set_direct(descriptor, wanted=True)

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self._begin + self._filled

    def write(self, tensor: Tensor) -> None:
        """Append the tensor's bytes, which may change afterwards."""
        content = content_of(tensor).numpy()
        while content.size:
            taken = content[: CHUNK - self._filled]
            np.copyto(self._chunk.numpy()[self._filled : self._filled + taken.size], taken)
            self._filled += taken.size
            content = content[taken.size :]
            if self._filled == CHUNK:
                self._send()

    def finish(self) -> None:
        """Wait until everything is on its way to the disk and compared, the last, shorter chunk included."""
        while self._under_way:
            self._settle()
        set_direct(self._descriptor, wanted=False)  # it ends where no block does
        if self._filled:
            self._send()
            self._settle()

    def close(self) -> None:
        """End the threads; the file may then be closed."""
        self._storing.shutdown(cancel_futures=True)
        self._hashing.shutdown(cancel_futures=True)

    def _send(self) -> None:
        part = self._chunk[: self._filled]
        work = [self._storing.submit(self._store, part, self._begin)]
        if self.digest is not None:
            work.append(self._hashing.submit(self.digest.update, part.numpy().data))
        self._under_way.append((self._chunk, work))
        self._begin, self._filled = self._begin + self._filled, 0
        if not self._free:
            self._settle()
        self._chunk = self._free.pop()

    def _settle(self) -> None:
        """Wait for the oldest chunk under way."""
        chunk, work = self._under_way.popleft()
        for each in work:
            each.result()
        self._free.append(chunk)

    def _store(self, part: Tensor, position: int) -> None:
        if not hasattr(self._again, "chunk"):
            self._again.chunk = aligned(CHUNK)
        again = self._again.chunk[: part.numel()]
        try:
            write_all(self._descriptor, position, part)
            check_same(self._descriptor, self._path, position, part, again)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            set_direct(self._descriptor, wanted=False)  # larger blocks than usual, or a partial write
            write_all(self._descriptor, position, part)
            check_same(self._descriptor, self._path, position, part, again)
