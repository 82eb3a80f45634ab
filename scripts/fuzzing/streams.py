"""Damage to bytes that knows nothing of their meaning: flips, cuts, insertions, zeroed and copied ranges."""

from __future__ import annotations

import struct
from random import Random

from fuzzing.directories import Entry


def damage_file(entries: dict[str, Entry], random: Random) -> str:
    name = random.choice([name for name, entry in sorted(entries.items()) if isinstance(entry, bytes) and entry])
    content = entries[name]
    if not isinstance(content, bytes):
        raise ValueError("no file any more")
    begin = _data_begin(name, content)
    at = random.randrange(len(content))
    entries[name] = damaged(content, at, random)
    return "bytes of data" if at > begin and len(entries[name]) == len(content) else f"bytes of {_kind(name)}"


def damage_safetensors_header(entries: dict[str, Entry], random: Random) -> str:
    return _damage_header(entries, random, ".safetensors")


def damage_gguf_header(entries: dict[str, Entry], random: Random) -> str:
    return _damage_header(entries, random, ".gguf")


def _damage_header(entries: dict[str, Entry], random: Random, ending: str) -> str:
    name = random.choice([name for name in sorted(entries) if name.endswith(ending)])
    content = entries[name]
    if not isinstance(content, bytes):
        raise ValueError("no file any more")
    entries[name] = damaged(content, random.randrange(_data_begin(name, content)), random)
    return "bytes of a header"


def damaged(content: bytes, at: int, random: Random) -> bytes:
    """`content` with something done at `at`."""
    length = random.choice([1, 1, 2, 4, 8, 16, 64, 1000])
    end = min(len(content), at + length)
    match random.randrange(10):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + random.randbytes(length) + content[at:]
        case 2:
            return content[:at] + content[end:]
        case 3:
            return content[:at] + bytes(end - at) + content[end:]
        case 4:
            return content[:at] + b"\xff" * (end - at) + content[end:]
        case 5:
            source = random.randrange(len(content))
            return content[:at] + content[source : source + end - at].ljust(end - at, b"\0") + content[end:]
        case 6:
            return content[:at] + content[at:end] * 2 + content[end:]
        case 7:
            number = random.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
            return (content[:at] + struct.pack("<Q", number) + content[at + 8 :])[: len(content)]
        case _:
            flipped = bytearray(content)
            for _ in range(random.choice([1, 1, 1, 2, 8])):
                flipped[min(len(content) - 1, at + random.randrange(16))] ^= 1 << random.randrange(8)
            return bytes(flipped)


def _data_begin(name: str, content: bytes) -> int:
    """Where the tensors' bytes begin, about; the length for files without any."""
    if name.endswith(".safetensors") and len(content) > 8:
        return min(len(content), 8 + struct.unpack("<Q", content[:8])[0])
    if name.endswith(".gguf"):
        last = content.rfind(b"blk.0.")
        return min(len(content), last + 64) if last > 0 else len(content)
    return len(content)


def _kind(name: str) -> str:
    if name.endswith((".safetensors", ".gguf")):
        return "a header"
    return "a tokenizer" if "token" in name or "chat" in name else "a config"
