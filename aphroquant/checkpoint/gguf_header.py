"""The header of a GGUF file, version 3: what `gguf_reader` reads, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aphroquant.formats.gguf import BlockType
from aphroquant.formats.gguf.block_types import TYPE_IDS

ALIGNMENT = 32
# bytes: a value of another file, its type included, as it stands there.
Value = bool | int | float | str | Sequence[str] | NDArray[np.generic] | bytes

_STRING, _ARRAY, _BOOL, _U32, _F32, _U64 = 8, 9, 7, 4, 6, 10
_ARRAY_TYPES = {"int32": 5, "float32": 6, "uint32": 4}


class PlacedTensor(NamedTuple):
    """`shape` with the innermost dimension last; `begin` from the start of the data."""

    block_type: BlockType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def place(tensors: Mapping[str, tuple[BlockType, tuple[int, ...]]]) -> dict[str, PlacedTensor]:
    """Where each tensor goes, one after the other, aligned."""
    placed, position = {}, 0
    for name, (block_type, shape) in tensors.items():
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        nbytes = rows * block_type.row_bytes(shape[-1])
        placed[name] = PlacedTensor(block_type, shape, position, nbytes)
        position += nbytes + -nbytes % ALIGNMENT
    return placed


def encode_header(metadata: Mapping[str, Value], tensors: Mapping[str, PlacedTensor]) -> bytes:
    """Everything before the data, padded so that the data is aligned. Integers are stored as u32 if they fit."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        parts += [_string(name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", TYPE_IDS[tensor.block_type.name], tensor.begin))
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        assert value >= 0, f"{key} = {value} is negative"
        return struct.pack("<II", _U32, value) if value < 2**32 else struct.pack("<IQ", _U64, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = _ARRAY_TYPES[value.dtype.name]
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + np.ascontiguousarray(value).tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_string(str(item)) for item in value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
