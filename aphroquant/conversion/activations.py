"""Activations of all calibration windows: in memory, or past a limit in an unnamed file that the kernel pages."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aphroquant.errors import ResourceError

CHUNK_TOKENS = 4096  # at once through a block; larger temporaries are returned to the kernel and cost page faults
MEMORY_SHARE = 0.5  # of the machine's memory, that all stores together may take

GPU_SHARE = 0.1  # of a GPU's free memory, that one store may take; blocks and their Hessians need the rest


def default_memory_limit(num_stores: int = 2) -> int:
    """Bytes that each of so many stores keeps in memory at most."""
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE / num_stores)


def gpu_limit(device: torch.device) -> float:
    """Bytes that one store keeps on a GPU at most."""
    return torch.cuda.mem_get_info(device)[0] * GPU_SHARE


class Activations:
    """Rows [T, width] float32 of whole windows. Slices of `rows` are views: writing to them changes the store.

    They are on a GPU if that is the `device` and they take little of what it has free.
    """

    def __init__(self, num_tokens: int, width: int, *, memory_limit: int, device: torch.device | None = None) -> None:
        num_bytes = num_tokens * width * 4
        on_gpu = device is not None and device.type == "cuda" and num_bytes < gpu_limit(device)
        self.spilled = num_bytes > memory_limit and not on_gpu
        place = device if on_gpu else torch.device("cpu")
        self.rows = _mapped(num_tokens, width) if self.spilled else torch.empty(num_tokens, width, device=place)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def copy(self, memory_limit: int, device: torch.device) -> Activations:
        """The same rows in a store of their own."""
        copy = Activations(len(self), self.rows.shape[1], memory_limit=memory_limit, device=device)
        copy.rows.copy_(self.rows)
        return copy


def chunks(num_tokens: int, window_len: int) -> Iterator[slice]:
    """Slices of whole windows, about CHUNK_TOKENS rows each."""
    step = max(1, CHUNK_TOKENS // window_len) * window_len
    return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def _mapped(num_tokens: int, width: int) -> Tensor:
    """A shared mapping of a deleted temporary file: it is gone with the process, however that ends."""
    descriptor, name = tempfile.mkstemp(prefix="aphroquant-activations-")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(num_tokens * width * 4, 1))
            mapped = np.memmap(file, dtype=np.float32, mode="r+", shape=(num_tokens, width))
    except OSError as error:
        needed = num_tokens * width * 4 / 1e9
        raise ResourceError(
            f"{path.parent}: no room for {needed:.1f} GB of activations: {error.strerror or error}",
            hint="fewer --samples, or a TMPDIR on a larger disk",
        ) from error
    finally:
        path.unlink()
    return torch.from_numpy(mapped)
