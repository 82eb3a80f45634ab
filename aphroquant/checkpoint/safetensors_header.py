"""The header of a safetensors file, checked in full before any tensor is read.

A file is a little-endian u64 header length, a JSON header, and the tensors' bytes. The header maps names to dtype,
shape and `data_offsets` [begin, end) into the bytes. The tensors must fill the bytes exactly: a file with a gap, an
overlap or a missing tail is damaged (or hides something), and is refused as the safetensors library refuses it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aphroquant.checkpoint.files import is_pickle, opened, pickle_error
from aphroquant.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**56  # beyond any file; keeps the strides of shapes like [2**40, 2**40, 0] inside torch's 64 bits
METADATA_KEY = "__metadata__"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor's bytes are: `begin` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Header(NamedTuple):
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The tensors of one file, by name. InputError naming the file and the tensor for any contradiction."""
    with opened(path) as (file, size):
        length = _header_length(file.read(8), size, path)
        entries = _parse(file.read(length), path)
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: {METADATA_KEY} must map strings to strings")
    begin = 8 + length
    tensors = {name: _stored_tensor(path, name, entry, begin, size) for name, entry in entries.items()}
    _check_coverage(path, tensors, begin, size)
    return Header(tensors, metadata)


def encode_header(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, length: int | None = None
) -> bytes:
    """Length and JSON of a header, padded so that the data starts at a multiple of 8, or at `length`.

    `begin` of the tensors counts from the data.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    for name, (dtype, shape, begin, nbytes) in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, begin + nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if length is None else length - 8 - len(text))
    return struct.pack("<Q", len(text)) + text


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise InputError(f"{path}: is {size} bytes long, too short for a safetensors file")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES or length > size - 8:
        if is_pickle(prefix):
            raise pickle_error(path)
        raise InputError(
            f"{path}: the header claims {length} bytes in a file of {size}",
            hint="the file is truncated or not a safetensors file; download it again",
        )
    return length


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise InputError(f"{path}: is not a safetensors file: the header is no JSON object")
    try:
        entries: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_checked_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not valid JSON: {error}") from error
    return entries


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not key.isprintable():  # lone surrogates and control characters, which would garble every message
            raise ValueError(f"the key {key!r} holds unprintable characters")
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _stored_tensor(path: Path, name: str, entry: Any, data_begin: int, size: int) -> StoredTensor:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(f"{where}: dtype {dtype_name!r} is not supported; known are {', '.join(DTYPES)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: shape {shape} and data_offsets {offsets} must be lists of counts")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InputError(f"{where}: shape {shape} is too large")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype_name].itemsize
    if begin > end or data_begin + end > size:
        raise InputError(
            f"{where}: data_offsets [{begin}, {end}] lie outside the file's {size - data_begin} bytes of data",
            hint="the file is truncated; download it again",
        )
    if end - begin != nbytes:
        raise InputError(f"{where}: {dtype_name} {shape} needs {nbytes} bytes, but data_offsets hold {end - begin}")
    return StoredTensor(DTYPES[dtype_name], tuple(shape), data_begin + begin, nbytes)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, StoredTensor], begin: int, size: int) -> None:
    reached = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != reached:
            problem = "overlaps the tensor before it" if tensor.begin < reached else "leaves a gap before it"
            raise InputError(f"{path}: {name}: data_offsets begin at {tensor.begin - begin}, which {problem}")
        reached += tensor.nbytes
    if reached != size:
        raise InputError(f"{path}: {size - reached} bytes after the last tensor belong to none")
