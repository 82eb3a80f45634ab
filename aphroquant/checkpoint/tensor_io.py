"""Bytes of a file as a tensor. Each read opens, seeks and reads just its range into memory of its own.

Nothing is shared with the file, so a caller may change the tensor, and a file that shrinks meanwhile is an error, not a
crash. What is written is read again at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.checkpoint.files import opened
from aphroquant.errors import InputError, ResourceError
from aphroquant.numbers import same_bytes

_STEP = 2**20  # bytes written and read again at a time: what is compared is then in the processor's cache


def read_bytes(path: Path, name: str, begin: int, nbytes: int) -> Tensor:
    """uint8 [nbytes] from offset `begin`. `name` is the tensor, for the message."""
    buffer = buffers.empty((nbytes,), torch.uint8)
    with opened(path) as (file, _):
        file.seek(begin)
        view = buffer.numpy().data
        done = 0
        while done < nbytes:  # one read gives at most 2 GiB
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{path}: {name}: the file ends {nbytes - done} bytes too early")
            done += count
    return buffer


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
