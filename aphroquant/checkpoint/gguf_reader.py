"""The header of a GGUF file (versions 2 and 3): metadata and where each tensor is.

Every length and count in the file is checked against the bytes that are left before anything of that size is made, so
a damaged or hostile header is an InputError and never a huge allocation or a read outside the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aphroquant.checkpoint.files import is_pickle, opened, pickle_error
from aphroquant.errors import InputError
from aphroquant.formats.gguf import BLOCK_TYPES, UNREADABLE_TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_STRINGS = 2**24  # of one array: a Python string needs several times the bytes of its file
MAX_DIMENSIONS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class GgufTensor(NamedTuple):
    """One tensor: `shape` with the innermost dimension last, `begin` from the start of the file."""

    block_type: BlockType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufHeader(NamedTuple):
    """`spans` are where each metadata value stands in the file, its type included: (begin, end)."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    spans: dict[str, tuple[int, int]]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata (arrays of numbers as numpy arrays, of strings as lists) and tensors, checked in full."""
    with opened(path) as (file, size):
        if size == 0:  # cannot be mapped
            raise InputError(f"{path}: is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(_Cursor(content, path))


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content = content
        self.path = path
        self.position = 0

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fail(f"{what} needs {count} bytes at offset {self.position}, but {self.left} are left")
        begin, self.position = self.position, self.position + count
        return self.content[begin : self.position]

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def u32(self, what: str) -> int:
        value: int = struct.unpack("<I", self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = struct.unpack("<Q", self.take(8, what))[0]
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that follow, each of at least `least_bytes`."""
        count = self.u64(what)
        if count * least_bytes > self.left:
            raise self.fail(f"{what} is {count}, more than the {self.left} bytes left can hold")
        return count

    def string(self, what: str) -> str:
        text = self.take(self.u64(f"the length of {what}"), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at offset {self.position - len(text)} is not UTF-8") from error

    def name(self, what: str) -> str:
        name = self.string(what)
        if not name.isprintable():
            raise self.fail(f"{what} {name!r} holds unprintable characters")
        return name


def _parse(cursor: _Cursor) -> GgufHeader:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise pickle_error(cursor.path) if is_pickle(magic) else cursor.fail("is not a GGUF file")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        kind = "big-endian" if version.bit_length() > 16 else f"version {version}"
        raise cursor.fail(f"{kind} GGUF is not supported; versions 2 and 3, little-endian, are")
    num_tensors = cursor.count("the number of tensors", 24)
    num_pairs = cursor.count("the number of metadata entries", 13)
    metadata: dict[str, Any] = {}
    spans = {}
    for _ in range(num_pairs):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key} stands twice")
        begin = cursor.position
        metadata[key] = _value(cursor, key)
        spans[key] = begin, cursor.position
    _check_split(cursor, metadata)
    placed = [_tensor_info(cursor) for _ in range(num_tensors)]
    return GgufHeader(metadata, _place(cursor, placed, _alignment(cursor, metadata)), spans)


def _check_split(cursor: _Cursor, metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count > 1:
        number = metadata.get("split.no", 0)
        part = number + 1 if isinstance(number, int) else number
        raise InputError(
            f"{cursor.path}: is part {part} of a model split into {count} files, which are not read",
            hint="join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
        )


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.u32(f"the type of {key}")
    if kind == _STRING:
        return cursor.string(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    values = _numbers(cursor, key, kind, 1)
    return bool(values[0]) if kind == _BOOL else values[0].item()


def _array(cursor: _Cursor, key: str) -> Any:
    kind = cursor.u32(f"the element type of {key}")
    if kind != _STRING:
        return _numbers(cursor, key, kind, cursor.u64(f"the length of {key}"))
    count = cursor.count(f"the length of {key}", 8)
    if count > MAX_STRINGS:
        raise cursor.fail(f"{key} has {count} strings; at most {MAX_STRINGS} are read")
    return [cursor.string(f"an element of {key}") for _ in range(count)]


def _numbers(cursor: _Cursor, key: str, kind: int, count: int) -> Any:
    if kind not in _SCALARS:
        raise cursor.fail(f"{key} has the unknown type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


def _tensor_info(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """Name and tensor, `begin` still counted from the start of the data."""
    name = cursor.name("a tensor name")
    num_dimensions = cursor.u32(f"the number of dimensions of {name}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"{name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(reversed([cursor.u64(f"a dimension of {name}") for _ in range(num_dimensions)]))
    type_id = cursor.u32(f"the type of {name}")
    if type_id not in BLOCK_TYPES:
        known = ", ".join(block_type.name for block_type in BLOCK_TYPES.values())
        found = UNREADABLE_TYPES.get(type_id, f"id {type_id}")
        raise cursor.fail(f"{name} has the tensor type {found}, which is not supported; supported are {known}")
    block_type = BLOCK_TYPES[type_id]
    if min(shape) < 1 or shape[-1] % block_type.block_size:
        raise cursor.fail(
            f"{name}: rows of {list(shape)} are no multiple of {block_type.name}'s {block_type.block_size}"
        )
    nbytes = math.prod(shape) // block_type.block_size * block_type.block_bytes
    return name, GgufTensor(block_type, shape, cursor.u64(f"the offset of {name}"), nbytes)


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment = {alignment} must be a power of two, at least 8")
    return alignment


def _place(cursor: _Cursor, listed: list[tuple[str, GgufTensor]], alignment: int) -> dict[str, GgufTensor]:
    """The tensors by name, `begin` from the start of the file. They must follow each other as llama.cpp has them."""
    reached = _aligned(cursor.position, alignment)
    data_begin = reached
    tensors: dict[str, GgufTensor] = {}
    end = reached
    for name, tensor in sorted(listed, key=lambda item: item[1].begin):
        begin = data_begin + tensor.begin
        if name in tensors:
            raise cursor.fail(f"the tensor {name} stands twice")
        if begin != reached:
            raise cursor.fail(
                f"{name}: the offset is {tensor.begin}, and the tensors before it end at {reached - data_begin}"
            )
        end = begin + tensor.nbytes
        if end > len(cursor.content):
            raise InputError(
                f"{cursor.path}: {name} needs {tensor.nbytes} bytes at offset {begin}, "
                f"and the file ends at {len(cursor.content)}",
                hint="the file is truncated; download it again",
            )
        reached = _aligned(end, alignment)
        tensors[name] = tensor._replace(begin=begin)
    if tensors and len(cursor.content) not in (end, reached):  # the last tensor's padding may be left out
        raise cursor.fail(f"the tensors end at {end}, and the file has {len(cursor.content)} bytes")
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return position + -position % alignment
