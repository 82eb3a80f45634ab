"""One file of a job: tensors and a few facts, on the disk as soon as it has its name.

A record is a safetensors file called KIND-NUMBER-CHECKSUM.safetensors. It is written under another name, flushed, and
renamed; the checksum (CRC-32 of all its bytes) tells a record that a failing disk has torn from a whole one. It guards
against accidents alone, and costs a third of what SHA-256 does.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint.disk import fsync
from aphroquant.checkpoint.files import opened
from aphroquant.checkpoint.safetensors_header import StoredTensor, encode_header, read_header
from aphroquant.errors import InputError

_STEP = 2**22  # bytes at a time
_FACTS = "facts"
_NAME = re.compile(r"([a-z]+\d*)-(\d{6})-([0-9a-f]{8})\.safetensors")
_PARTIAL = ".partial"


class RecordFile(NamedTuple):
    """A record in a directory. `number` counts records of a kind."""

    kind: str
    number: int
    path: Path
    checksum: int


class Record(NamedTuple):
    """What a record holds. `facts` are as JSON gives them back."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_record(
    directory: Path, kind: str, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> RecordFile:
    """Store a record; it is on the disk when this returns. Tensors on a GPU are copied a piece at a time."""
    partial = directory / f".{kind}-{number:06d}{_PARTIAL}"
    checksum = 0
    try:
        with partial.open("wb", buffering=0) as file:
            for part in _content(tensors, facts):
                checksum = zlib.crc32(part, checksum)
                _write_all(file, part)
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk it takes the room that others need
        raise
    path = directory / f"{kind}-{number:06d}-{checksum:08x}.safetensors"
    partial.rename(path)
    fsync(directory)
    return RecordFile(kind, number, path, checksum)


def read_record(record: RecordFile, into: Mapping[str, Tensor] | None = None) -> Record:
    """What `write_record` stored. Tensors named in `into` are filled in place, and are not in the result."""
    header = read_header(record.path)
    given = into or {}
    tensors: dict[str, Tensor] = {}
    with opened(record.path) as (file, _):
        for name, stored in header.tensors.items():
            target = given.get(name)
            if target is None:
                target = tensors[name] = torch.empty(stored.shape, dtype=stored.dtype)
            _check_like(record, name, stored, target)
            _fill(file, stored, target)
    return Record(tensors, json.loads(header.metadata[_FACTS]))


def is_whole(record: RecordFile) -> bool:
    """Whether the file's bytes are those that were written."""
    checksum, buffer = 0, memoryview(bytearray(_STEP))
    try:
        with opened(record.path) as (file, _):
            while count := file.readinto(buffer):
                checksum = zlib.crc32(buffer[:count], checksum)
    except InputError:
        return False
    return checksum == record.checksum


def find_records(directory: Path) -> list[RecordFile]:
    """All records of a directory by their names, in the order of kind and number."""
    found = []
    for path in directory.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.append(RecordFile(match[1], int(match[2]), path, int(match[3], 16)))
    return sorted(found)


def remove_partial(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def _content(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[memoryview]:
    """The file, a part at a time."""
    placed, position = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in ordered:
        placed[name] = StoredTensor(tensor.dtype, tuple(tensor.shape), position, tensor.nbytes)
        position += tensor.nbytes
    yield memoryview(encode_header(placed, {_FACTS: json.dumps(facts)}))
    for _, tensor in ordered:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, flat.numel(), _STEP):
            yield flat[start : start + _STEP].cpu().numpy().data


def _check_like(record: RecordFile, name: str, stored: StoredTensor, target: Tensor) -> None:
    if target.dtype != stored.dtype or tuple(target.shape) != stored.shape:
        raise InputError(
            f"{record.path}: {name} is {stored.dtype} {list(stored.shape)}, not {target.dtype} {list(target.shape)}"
        )


def _fill(file: FileIO, stored: StoredTensor, target: Tensor) -> None:
    """Read a tensor's bytes to where `target` lies, which is contiguous."""
    assert target.is_contiguous()
    file.seek(stored.begin)
    flat, step = target.view(-1), _STEP // stored.dtype.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        buffer = bytearray(part.nbytes)
        done = 0
        while count := file.readinto(memoryview(buffer)[done:]):
            done += count
        if done != len(buffer):
            raise InputError(f"the record ends {len(buffer) - done} bytes too early")
        part.copy_(torch.frombuffer(buffer, dtype=stored.dtype))


def _write_all(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
