"""One safetensors file in the making, each byte written once, and read again before the next comes.

The header stands in front of the tensors and is known last. So room is left for it, tensors go to their final place as
they come, and the header is filled up with spaces, as the format allows. A tensor whose length is no multiple of eight
bytes would leave the one behind it unaligned: those wait in a spool, and come last, widest dtypes first. A small shard,
in which the spaces would count, is copied together behind a header of its own length, in an order that does not depend
on that of arrival.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from aphroquant.checkpoint.safetensors_header import StoredTensor, encode_header
from aphroquant.checkpoint.tensor_io import write_bytes

HEADER_ROOM = 2 * 2**20  # some 15 000 tensors
SMALL_BYTES = 64 * HEADER_ROOM  # below it, a shard is copied together
_METADATA = {"format": "pt"}  # transformers refuses files without it
_ALIGNMENT = 8  # of the widest dtype


class Shard:
    """Tensors are appended; `finish` makes the file `path` whole. Nothing of it is readable before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._direct: dict[str, StoredTensor] = {}  # in the file, `begin` from its start
        self._spooled: dict[str, StoredTensor] = {}  # in the spool
        self._file: BinaryIO | None = path.open("wb+", buffering=0)
        self._file.seek(HEADER_ROOM)
        self._spool: BinaryIO | None = None

    @property
    def names(self) -> list[str]:
        return [*self._direct, *self._spooled]

    def append(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> None:
        """One tensor, in consecutive pieces, each flattened; the bytes are the kernel's when this returns."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        aligned = nbytes % _ALIGNMENT == 0
        target = self._opened() if aligned else self._opened_spool()
        begin = target.tell()
        for chunk in chunks:
            target.seek(write_bytes(target.fileno(), Path(target.name), target.tell(), chunk))
        assert target.tell() - begin == nbytes, f"{name}: its pieces are no {shape} of {dtype}"
        (self._direct if aligned else self._spooled)[name] = StoredTensor(dtype, shape, begin, nbytes)
        self.nbytes += nbytes

    def finish(self) -> None:
        """Header and spooled tensors to their places."""
        spooled = dict(sorted(self._spooled.items(), key=_widest_first))
        tensors = {name: place._replace(begin=place.begin - HEADER_ROOM) for name, place in self._direct.items()}
        position = sum(place.nbytes for place in self._direct.values())
        for name, place in spooled.items():
            tensors[name] = place._replace(begin=position)
            position += place.nbytes
        header = encode_header(tensors, _METADATA)
        if self.nbytes < SMALL_BYTES or len(header) > HEADER_ROOM:
            self._copy_together()
        else:
            file = self._opened()
            for place in spooled.values():
                _copy_range(self._opened_spool().fileno(), place, file.fileno())
            file.seek(0)
            _write_all(file, memoryview(encode_header(tensors, _METADATA, length=HEADER_ROOM)))
        self.close()

    def close(self) -> None:
        """Release the files, and remove the spool."""
        for file in (self._file, self._spool):
            if file is not None:
                file.close()
        if self._spool is not None:
            Path(self._spool.name).unlink(missing_ok=True)
        self._file = self._spool = None

    def _opened(self) -> BinaryIO:
        assert self._file is not None, "the shard is finished"
        return self._file

    def _opened_spool(self) -> BinaryIO:
        if self._spool is None:
            self._spool = self.path.with_suffix(".spool").open("wb+", buffering=0)
        return self._spool

    def _copy_together(self) -> None:
        """The whole file anew: a header without spaces, then all tensors, widest dtypes first."""
        order = sorted([*self._direct.items(), *self._spooled.items()], key=_widest_first)
        placed, position = {}, 0
        for name, place in order:
            placed[name] = place._replace(begin=position)
            position += place.nbytes
        whole = self.path.with_suffix(".whole")
        with whole.open("wb", buffering=0) as file:
            _write_all(file, memoryview(encode_header(placed, _METADATA)))
            for name, place in order:
                source = self._opened() if name in self._direct else self._opened_spool()
                _copy_range(source.fileno(), place, file.fileno())
        whole.replace(self.path)


def _widest_first(item: tuple[str, StoredTensor]) -> tuple[int, str]:
    return -item[1].dtype.itemsize, item[0]


def _write_all(file: BinaryIO, content: memoryview) -> None:
    while content:  # one call writes at most 2 GiB
        content = content[file.write(content) :]


def _copy_range(source: int, place: StoredTensor, target: int) -> None:
    """Append a tensor in one file to another inside the kernel."""
    begin, nbytes = place.begin, place.nbytes
    while nbytes > 0:
        copied = os.sendfile(target, source, begin, nbytes)
        if copied == 0:
            raise OSError(errno.EIO, "the spooled tensors ended early")
        begin += copied
        nbytes -= copied
