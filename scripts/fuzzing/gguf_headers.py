"""Damage to GGUF headers, field by field and entry by entry."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from fuzzing.directories import Entry
from fuzzing.documents import TEMPLATES

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_NUMBERS = [0, 1, 2, 3, 5, 7, 9, 13, 16, 31, 39, 255, 2**16, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61,
            2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip


@dataclass
class _Parsed:
    """`fields`: (offset, width) of every number before the data; entries as raw bytes."""

    fields: list[tuple[int, int]]
    pairs: list[bytes]
    tensors: list[bytes]
    data: bytes


class _Walk:
    """Reads a sound header, and remembers where its numbers are."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 4
        self.fields: list[tuple[int, int]] = []

    def number(self, width: int) -> int:
        if self.at + width > len(self.content):
            raise ValueError("the header is damaged already")
        self.fields.append((self.at, width))
        value = int.from_bytes(self.content[self.at : self.at + width], "little")
        self.at += width
        return value

    def string(self) -> None:
        length = self.number(8)
        self.at += length

    def value(self, kind: int, depth: int = 0) -> None:
        if depth > 9:
            raise ValueError("the header is damaged already")
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            element, count = self.number(4), self.number(8)
            for _ in range(count):
                self.value(element, depth + 1)
        else:
            self.number(_WIDTHS[kind])

    def pair(self) -> bytes:
        begin = self.at
        self.string()
        self.value(self.number(4))
        return self.content[begin : self.at]

    def tensor(self) -> bytes:
        begin = self.at
        self.string()
        for _ in range(self.number(4)):
            self.number(8)
        self.number(4)
        self.number(8)
        return self.content[begin : self.at]


def damage_fields(entries: dict[str, Entry], random: Random) -> str:
    """One to three numbers of the header become others."""
    content = bytearray(_content(entries))
    fields = _parsed(bytes(content)).fields
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at, width = random.choice(_favoured(fields, random))
        old = int.from_bytes(content[at : at + width], "little")
        new = random.choice([*_NUMBERS, old + 1, old - 1, old * 2, old // 2, old ^ 1 << random.randrange(8 * width)])
        content[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    entries["model.gguf"] = bytes(content)
    return "gguf field"


def damage_entries(entries: dict[str, Entry], random: Random) -> str:
    """Metadata and tensors missing, doubled, swapped, renamed, or of other values."""
    parsed = _parsed(_content(entries))
    chosen = random.choice([parsed.pairs, parsed.tensors])
    index = random.randrange(len(chosen))
    match random.randrange(7):
        case 0:
            del chosen[index]
        case 1:
            chosen.append(chosen[index])
        case 2:
            other = random.randrange(len(chosen))
            chosen[index], chosen[other] = chosen[other], chosen[index]
        case 3:
            name = _name(chosen[index])
            new = random.choice([b"", b"\xff\xfe", b"\0", b"\x1b[2J", name + b"x", name.upper(), b"a" * 70000])
            chosen[index] = struct.pack("<Q", len(new)) + new + chosen[index][8 + len(name) :]
        case 4:
            key = random.choice([_name(pair) for pair in parsed.pairs] + [b"general.alignment", b"rope_freqs.weight"])
            parsed.pairs = [pair for pair in parsed.pairs if _name(pair) != key]
            parsed.pairs.append(struct.pack("<Q", len(key)) + key + _junk_value(random))
        case 5:
            template = random.choice(TEMPLATES).encode()
            key = b"tokenizer.chat_template"
            parsed.pairs = [pair for pair in parsed.pairs if _name(pair) != key]
            parsed.pairs.append(struct.pack("<Q", len(key)) + key + _text(template))
        case _:
            first, second = random.sample(parsed.tensors, 2)
            parsed.tensors[parsed.tensors.index(first)] = first[:-8] + second[-8:]
    entries["model.gguf"] = _joined(parsed)
    return "gguf entry"


def _junk_value(random: Random) -> bytes:
    """Type and value."""
    match random.randrange(8):
        case 0:
            return struct.pack("<IQ", 10, random.choice(_NUMBERS))
        case 1:
            return struct.pack("<Iq", 11, -random.choice(_NUMBERS[:-4]))
        case 2:
            return struct.pack("<If", 6, random.choice([0.0, -1.0, float("nan"), float("inf"), 1e38]))
        case 3:
            return _text(random.choice([b"", b"x", b"\xff", b"\x1b[2J", b"gpt2", b"llama", b"bert", b"x" * 10**5]))
        case 4:
            depth = random.choice([1, 50, 5000])
            return struct.pack("<I", _ARRAY) + struct.pack("<IQ", _ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)
        case 5:
            count = random.choice([0, 1, 3, 300])
            return struct.pack("<IIQ", _ARRAY, 4, count) + random.randbytes(4 * count)
        case 6:
            count = random.choice([0, 1, 300])
            return struct.pack("<IIQ", _ARRAY, _STRING, count) + struct.pack("<Q", 1) * 0 + _strings(count, random)
        case _:
            return struct.pack("<IB", 7, random.choice([0, 1, 2, 255]))


def _strings(count: int, random: Random) -> bytes:
    parts = [random.choice([b"", b"a", b"a b", b"\xc3\xa9", b"x" * 2000]) for _ in range(count)]
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def _text(content: bytes) -> bytes:
    return struct.pack("<IQ", _STRING, len(content)) + content


def _favoured(fields: list[tuple[int, int]], random: Random) -> list[tuple[int, int]]:
    """The tokenizer's arrays are most of a header: mostly the numbers at its start and its end."""
    return fields if random.random() < 0.2 else [*fields[:80], *fields[-120:]]


def _name(entry: bytes) -> bytes:
    length: int = struct.unpack("<Q", entry[:8])[0]
    return entry[8 : 8 + length]


def _content(entries: dict[str, Entry]) -> bytes:
    content: Any = entries["model.gguf"]
    if not isinstance(content, bytes):
        raise ValueError("no file any more")
    return content


def _parsed(content: bytes) -> _Parsed:
    if content[:4] != b"GGUF":
        raise ValueError("no header any more")
    walk = _Walk(content)
    walk.number(4)
    num_tensors, num_pairs = walk.number(8), walk.number(8)
    if num_tensors > 1000 or num_pairs > 1000:
        raise ValueError("the header is damaged already")
    pairs = list(_each(walk.pair, num_pairs))
    tensors = list(_each(walk.tensor, num_tensors))
    return _Parsed(walk.fields, pairs, tensors, content[walk.at + -walk.at % _ALIGNMENT :])


def _each(read: Any, count: int) -> Iterator[bytes]:
    return (read() for _ in range(count))


def _joined(parsed: _Parsed) -> bytes:
    counts = struct.pack("<IQQ", 3, len(parsed.tensors), len(parsed.pairs))
    header = b"".join([b"GGUF", counts, *parsed.pairs, *parsed.tensors])
    return header + bytes(-len(header) % _ALIGNMENT) + parsed.data
