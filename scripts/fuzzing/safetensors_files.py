"""Damage to safetensors files: entries of the header that lie, and tensors stored rightly that hold nonsense."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

import numpy as np

from fuzzing.directories import Entry

DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "F16": 2, "BF16": 2,
          "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip
_SIZES = [0, 1, 2, 3, 16, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -1, 10**30, 1.0, "1", None, True]
_NAMES = [
    "",
    ".",
    "..",
    "a",
    "\0",
    "\x1b[31m",
    "\ud800",
    "x" * 100_000,
    "model.layers.99999999999999999999.mlp",
    "__metadata__",
]
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8, "I16": np.int16,
          "I32": np.int32, "I64": np.int64, "BOOL": np.uint8}  # fmt: skip


def damage_entries(entries: dict[str, Entry], random: Random) -> str:
    """A header that contradicts itself or the file."""
    file, header, data = _split(entries, random)
    name = random.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    match random.randrange(12):
        case 0:
            entry["dtype"] = random.choice([*DTYPES, "F4", "", None, 1, "f16", "F8_E4M3FNUZ"])
        case 1:
            size = random.choice(_SIZES)
            entry["shape"] = random.choice([[size], [size, size], entry["shape"] + [size], [size] * 40, size, [[size]]])
        case 2:
            entry["shape"] = random.choice(
                [entry["shape"][::-1], [math.prod(entry["shape"])], [1, *entry["shape"]], []]
            )
        case 3:
            entry["data_offsets"][random.randrange(2)] = random.choice([*_SIZES, len(data), len(data) + 1])
        case 4:
            begin, end = entry["data_offsets"]
            shift = random.choice([1, -1, 8, -8, end - begin])
            entry["data_offsets"] = random.choice(
                [[begin + shift, end + shift], [end, begin], [begin, end, end], [begin]]
            )
        case 5:
            other = header[random.choice(sorted(set(header) - {"__metadata__"}))]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 6:
            del header[name]
        case 7:
            header[random.choice([*_NAMES, name.upper(), name + "x", "../" + name])] = header.pop(name)
        case 8:
            header["__metadata__"] = random.choice([None, [], {"a": 1}, {"a": {}}, "x", {"format": "x" * 10**6}])
        case 9:
            entry[random.choice(["extra", "dtype ", ""])] = 1
        case 10:
            text = json.dumps(header)
            pair = f"{json.dumps(name)}: {json.dumps(entry)}"
            entries[file] = _encoded(text[:-1] + ", " + pair + "}", data)
            return "header entry"
        case _:
            length = random.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, 100_000_000, 100_000_001, len(data)])
            entries[file] = struct.pack("<Q", length) + json.dumps(header).encode() + data
            return "header entry"
    entries[file] = _encoded(json.dumps(header), data)
    return "header entry"


def damage_tensors(entries: dict[str, Entry], random: Random) -> str:
    """A sound file with a tensor too few, too many, of another shape or dtype, or of other values."""
    file, header, data = _split(entries, random)
    metadata = header.pop("__metadata__", None)
    tensors = {name: [e["dtype"], e["shape"], data[slice(*e["data_offsets"])]] for name, e in header.items()}
    name = random.choice(sorted(tensors))
    dtype, shape, content = tensors[name]
    kind = "tensors"
    match random.randrange(9):
        case 0:
            del tensors[name]
        case 1:
            other = random.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 2:
            dtype = random.choice(list(DTYPES))
            tensors[name] = [dtype, shape, random.randbytes(math.prod(shape) * DTYPES[dtype])]
        case 3:
            doubled, halved = [2 * size for size in shape], [size // 2 for size in shape]
            shape = random.choice([[], [0], [1], [*shape, 1], shape[:-1], doubled, halved, shape[::-1], [0, *shape],
                                   [2**40, 0]])  # fmt: skip
            tensors[name][1:] = shape, bytes(math.prod(shape) * DTYPES[dtype])
        case 4:
            new = random.choice([name + "_2", name.rpartition(".")[0] + ".weight", name.rpartition(".")[0] + ".g_idx",
                                 name.rpartition(".")[0], "model.layers.0.self_attn.k_proj.output_scale",
                                 "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.kv_scale"])  # fmt: skip
            tensors[new] = list(tensors[name])
        case _:
            tensors[name][2] = _other_values(dtype, content, random)
            kind = "values of a tensor"
    entries[file] = _joined(tensors, metadata)
    return kind


def _other_values(dtype: str, content: bytes, random: Random) -> bytes:
    if dtype not in _NUMPY or random.random() < 0.2:
        return random.randbytes(len(content))
    values = np.frombuffer(content, _NUMPY[dtype]).copy()
    if not values.size:
        return content
    if values.dtype.kind == "f":
        value: Any = random.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 6e4, 1e-8, -0.0])
    else:
        info = np.iinfo(values.dtype)
        value = random.choice([0, 1, info.min, info.max, info.max // 2, 127, values[0] // 2 + 1])
    if random.random() < 0.5:
        values[:] = value
    else:
        values[random.randrange(values.size)] = value
    return values.tobytes()


def _split(entries: dict[str, Entry], random: Random) -> tuple[str, dict[str, Any], bytes]:
    file = random.choice([name for name in sorted(entries) if name.endswith(".safetensors")])
    content = entries[file]
    if not isinstance(content, bytes):
        raise ValueError("no file any more")
    length = struct.unpack("<Q", content[:8])[0]
    return file, json.loads(content[8 : 8 + length]), content[8 + length :]


def _encoded(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _joined(tensors: dict[str, list[Any]], metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return _encoded(json.dumps(header), data)
