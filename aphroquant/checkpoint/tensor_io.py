"""Bytes of a file as a tensor. Each read opens and reads just its range into memory of its own.

Nothing is shared with the file, so a caller may change the tensor, and a file that shrinks meanwhile is an error, not a
crash. What is written is read again at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.checkpoint.direct import ALIGNMENT, is_cached, read_into, set_direct
from aphroquant.checkpoint.files import opened
from aphroquant.checkpoint.followed import following
from aphroquant.errors import InputError, ResourceError
from aphroquant.numbers import same_bytes

_READ = 2**22  # bytes read at once
_READS_AT_ONCE = 3  # of one tensor: a disk that many ask gives more
_WIDEST = 8  # bytes of a number: where tensors must begin in memory
_THREAD = threading.local()
_STEP = 2**20  # bytes written and read again at a time: what is compared is then in the processor's cache


def read_bytes(path: Path, name: str, begin: int, nbytes: int) -> Tensor:
    """uint8 [nbytes] from offset `begin`. `name` is the tensor, for the message."""
    with opened(path) as (file, _), following(path, begin, nbytes) as reading:
        descriptor = file.fileno()
        # What is hashed on the way will not be read a second time, and need not fill the page cache.
        direct = reading is not None and _is_worth_it(descriptor, begin, nbytes)
        lead = begin % ALIGNMENT if direct else 0
        size = -(-(lead + nbytes) // ALIGNMENT) * ALIGNMENT if direct else nbytes
        memory = buffers.empty((size,), torch.uint8)
        set_direct(descriptor, wanted=direct and memory.data_ptr() % ALIGNMENT == 0)
        content = memory[lead : lead + nbytes]
        done = -lead
        for count in _filled(descriptor, begin - lead, memory):
            start, done = max(done, 0), min(done + count, nbytes)
            if reading is not None:
                reading.came(content.numpy().data[start:done])
    if done < nbytes:
        raise InputError(f"{path}: {name}: the file ends {nbytes - max(done, 0)} bytes too early")
    return content


@contextmanager
def kept_in_cache() -> Iterator[None]:
    """What this thread reads meanwhile goes through the page cache: it will read it again."""
    before = getattr(_THREAD, "keeps", False)
    _THREAD.keeps = True
    try:
        yield
    finally:
        _THREAD.keeps = before


def _is_worth_it(descriptor: int, begin: int, nbytes: int) -> bool:
    """Whether to pass the page cache by."""
    large = nbytes >= buffers.SMALLEST and begin % _WIDEST == 0
    return large and not getattr(_THREAD, "keeps", False) and not is_cached(descriptor, begin, nbytes)


def _filled(descriptor: int, position: int, memory: Tensor) -> Iterator[int]:
    """Read into the memory, several parts at once; how many bytes came of each, in order, until the file ends."""
    view = memory.numpy().data
    parts = [(position + start, view[start : start + _READ]) for start in range(0, len(view), _READ)]
    if len(parts) < 2:
        yield from (_fill(descriptor, *part) for part in parts)
        return
    with ThreadPoolExecutor(min(_READS_AT_ONCE, len(parts)), thread_name_prefix="reading") as pool:
        reads = deque(pool.submit(_fill, descriptor, *part) for part in parts)
        try:
            for _, part in parts:
                count = reads.popleft().result()
                yield count
                if count < len(part):
                    return
        finally:
            for read in reads:
                read.cancel()


def _fill(descriptor: int, position: int, part: memoryview) -> int:
    """How many bytes came; fewer than there is room for only at the file's end."""
    done = 0
    while done < len(part) and (count := read_into(descriptor, position + done, part[done:])):
        done += count
    return done


def as_tensor(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The bytes uint8 [n] seen as `dtype` and `shape`, without a copy."""
    return torch.empty(shape, dtype=dtype) if buffer.numel() == 0 else buffer.view(dtype).view(shape)


def content_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 [n], not copied if they lie in order in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def write_bytes(descriptor: int, path: Path, position: int, tensor: Tensor) -> int:
    """Write the tensor's bytes to this place of a file open for both, and return where they end. ResourceError naming
    `path` unless the file then holds them."""
    content = content_of(tensor)
    stored = torch.empty(min(_STEP, content.numel()), dtype=torch.uint8)
    for start in range(0, content.numel(), _STEP):
        part = content[start : start + _STEP]
        write_all(descriptor, position, part)
        check_same(descriptor, path, position, part, stored[: part.numel()])
        position += part.numel()
    return position


def write_all(descriptor: int, position: int, part: Tensor) -> None:
    """Write the bytes uint8 [n] to this place."""
    content = part.numpy().data
    while content:
        count = os.pwrite(descriptor, content, position)
        position, content = position + count, content[count:]


def check_same(descriptor: int, path: Path, position: int, part: Tensor, again: Tensor) -> None:
    """Read as many bytes into `again`. ResourceError naming `path` unless they are those of `part`."""
    if os.preadv(descriptor, [again.numpy().data], position) != part.numel() or not same_bytes(again, part):
        raise ResourceError(
            f"{path}: what was written is not what can be read back",
            hint="the disk, or the memory, is faulty; give another --out",
        )
