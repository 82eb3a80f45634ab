"""One safetensors file in the making, each byte written once, and read again before the next comes.

The header stands in front of the tensors and is known last. So room is left for it, tensors go to their final place as
they come, and the header is filled up with spaces, as the format allows. A tensor whose length is no multiple of eight
bytes would leave the one behind it unaligned: those wait in a spool, and come last, widest dtypes first. A small shard,
in which the spaces would count, is copied together behind a header of its own length, in an order that does not depend
on that of arrival.

A file's hash begins with its header. Who knows what is coming promises it, and the shard is hashed while it is written;
one that keeps no promise has to be read for its hash.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint.hashes import FileDigest, Span
from aphroquant.checkpoint.safetensors_header import StoredTensor, encode_header
from aphroquant.checkpoint.stream import OutputStream
from aphroquant.checkpoint.tensor_io import write_bytes

HEADER_ROOM = 2 * 2**20  # some 15 000 tensors
SMALL_BYTES = 64 * HEADER_ROOM  # below it, a shard is copied together
_METADATA = {"format": "pt"}  # transformers refuses files without it
_ALIGNMENT = 8  # of the widest dtype
_COPIED = 2**22  # bytes of the spool at once


class Promised(NamedTuple):
    """A tensor that will come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shard:
    """Tensors are appended; `finish` makes the file `path` whole. Nothing of it is readable before.

    `digest` is that of the file then, if exactly the `promised` tensors came.
    """

    def __init__(self, path: Path, promised: Iterable[Promised] = ()) -> None:
        self.path = path
        self.nbytes = 0
        self.digest: FileDigest | None = None
        self._direct: dict[str, StoredTensor] = {}  # in the file, `begin` from the start of the data
        self._spooled: dict[str, StoredTensor] = {}  # in the spool
        self._head, promised_digest = _promised_head(promised)
        self._file: BinaryIO | None = path.open("wb+", buffering=0)
        self._stream = OutputStream(self._file.fileno(), path, HEADER_ROOM, digest=promised_digest)
        self._spool: BinaryIO | None = None

    @property
    def names(self) -> list[str]:
        return [*self._direct, *self._spooled]

    def append(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> None:
        """One tensor, in consecutive pieces, each flattened; they may change when this returns."""
        nbytes = Promised(name, dtype, shape).nbytes
        aligned = nbytes % _ALIGNMENT == 0
        begin = self._stream.position - HEADER_ROOM if aligned else self._opened_spool().tell()
        for chunk in chunks:
            if aligned:
                self._stream.write(chunk)
            else:
                self._write_to_spool(chunk)
        end = self._stream.position - HEADER_ROOM if aligned else self._opened_spool().tell()
        assert end - begin == nbytes, f"{name}: its pieces are no {shape} of {dtype}"
        (self._direct if aligned else self._spooled)[name] = StoredTensor(dtype, shape, begin, nbytes)
        self.nbytes += nbytes

    def finish(self) -> None:
        """Header and spooled tensors to their places."""
        head = _encoded(_placed(self._direct, self._spooled))
        if self.nbytes < SMALL_BYTES or head is None:
            self._stream.finish()
            self._copy_together()
        else:
            for place in _in_order(self._spooled).values():
                self._append_spooled(place)
            self._stream.finish()
            write_bytes(self._opened().fileno(), self.path, 0, torch.frombuffer(bytearray(head), dtype=torch.uint8))
            if head == self._head:
                self.digest = self._stream.digest
        self.close()

    def close(self) -> None:
        """Release the files, and remove the spool."""
        self._stream.close()
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

    def _write_to_spool(self, chunk: Tensor) -> None:
        spool = self._opened_spool()
        spool.seek(write_bytes(spool.fileno(), Path(spool.name), spool.tell(), chunk))

    def _append_spooled(self, place: StoredTensor) -> None:
        """Copy a tensor from the spool to the end of the data."""
        for begin in range(place.begin, place.begin + place.nbytes, _COPIED):
            nbytes = min(_COPIED, place.begin + place.nbytes - begin)
            content = bytearray(os.pread(self._opened_spool().fileno(), nbytes, begin))
            if len(content) != nbytes:
                raise _shortened()
            self._stream.write(torch.frombuffer(content, dtype=torch.uint8))

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
                if name in self._direct:
                    begin = HEADER_ROOM + place.begin
                    _copy_range(self._opened().fileno(), begin, place.nbytes, file.fileno())
                else:
                    _copy_range(self._opened_spool().fileno(), place.begin, place.nbytes, file.fileno())
        whole.replace(self.path)


def split_promises(promised: Iterable[Promised], shard_bytes: int) -> list[list[Promised]]:
    """Those of each shard, of which none is larger than that unless one tensor is."""
    shards: list[list[Promised]] = []
    held = 0
    for tensor in promised:
        if not shards or held + tensor.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _promised_head(promised: Iterable[Promised]) -> tuple[bytes | None, FileDigest | None]:
    """The header of a shard of these tensors, and the digest of a file that begins with it; None if there are none, or
    it will be copied together."""
    direct: dict[str, StoredTensor] = {}
    spooled: dict[str, StoredTensor] = {}
    position = total = 0
    for tensor in promised:
        name, dtype, shape = tensor
        total += tensor.nbytes
        if tensor.nbytes % _ALIGNMENT:
            spooled[name] = StoredTensor(dtype, shape, 0, tensor.nbytes)
        else:
            direct[name] = StoredTensor(dtype, shape, position, tensor.nbytes)
            position += tensor.nbytes
    placed = _placed(direct, spooled)
    head = _encoded(placed)
    if not placed or total < SMALL_BYTES or head is None:
        return None, None
    digest = FileDigest({name: Span(HEADER_ROOM + place.begin, place.nbytes) for name, place in placed.items()})
    digest.update(memoryview(head))
    return head, digest


def _placed(direct: Mapping[str, StoredTensor], spooled: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """All tensors at their final places, counted from the start of the data."""
    placed, position = dict(direct), sum(place.nbytes for place in direct.values())
    for name, place in _in_order(spooled).items():
        placed[name] = place._replace(begin=position)
        position += place.nbytes
    return placed


def _in_order(spooled: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(spooled.items(), key=_widest_first))


def _encoded(placed: Mapping[str, StoredTensor]) -> bytes | None:
    """A header as long as the room for it; None if that is too little."""
    header = encode_header(placed, _METADATA, length=HEADER_ROOM)
    return header if len(header) == HEADER_ROOM else None


def _widest_first(item: tuple[str, StoredTensor]) -> tuple[int, str]:
    return -item[1].dtype.itemsize, item[0]


def _write_all(file: BinaryIO, content: memoryview) -> None:
    while content:  # one call writes at most 2 GiB
        content = content[file.write(content) :]


def _copy_range(source: int, begin: int, nbytes: int, target: int) -> None:
    """Append a part of one file to another inside the kernel."""
    while nbytes > 0:
        copied = os.sendfile(target, source, begin, nbytes)
        if copied == 0:
            raise _shortened()
        begin += copied
        nbytes -= copied


def _shortened() -> OSError:
    return OSError(errno.EIO, "the spooled tensors ended early")
