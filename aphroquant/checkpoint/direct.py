"""Files past the page cache (O_DIRECT): where the system refuses it, reads and writes go through the cache as ever."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from functools import cache

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 2**12  # that O_DIRECT wants of places in files and memory; larger than any usual block


def set_direct(descriptor: int, *, wanted: bool) -> None:
    """Let reads and writes pass the page cache by, if the system can; all that share the open file see it."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that has no such way
            raise


def aligned(nbytes: int) -> Tensor:
    """uint8 [nbytes] where O_DIRECT wants memory to begin."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


def read_into(descriptor: int, position: int, view: memoryview) -> int:
    """How many bytes came; none at the end of the file. Where O_DIRECT is refused, it ends for this open file."""
    try:
        return os.preadv(descriptor, [view], position)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        set_direct(descriptor, wanted=False)  # behind a file's last, shorter block, or with larger blocks than usual
        return os.preadv(descriptor, [view], position)


def is_cached(descriptor: int, begin: int, nbytes: int) -> bool:
    """Whether most of a range of a file is in the page cache already, or nobody can tell."""
    mincore, start = _mincore(), begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    if mincore is None or nbytes <= 0:
        return True
    length = begin + nbytes - start
    try:
        # Nothing of it is touched. A private mapping is writable whatever the file is, as from_buffer wants it.
        with mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE, offset=start) as mapping:
            pages = (ctypes.c_uint8 * (-(-length // mmap.PAGESIZE)))()
            memory = (ctypes.c_uint8 * length).from_buffer(mapping)
            failed = mincore(ctypes.byref(memory), ctypes.c_size_t(length), pages)
            del memory
    except (OSError, ValueError):  # a file that cannot be mapped, or has become shorter
        return True
    return bool(failed) or 2 * int(np.bitwise_and(pages, 1).sum(dtype=np.int64)) > len(pages)


@cache
def _mincore() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    try:
        return ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError):
        return None
