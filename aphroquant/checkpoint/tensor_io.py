"""Bytes of a file as a tensor. Each read opens, seeks and reads just its range into fresh memory: nothing is shared
with the file, so a caller may change the tensor, and a file that shrinks meanwhile is an error, not a crash."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.checkpoint.files import opened
from aphroquant.errors import InputError


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
