"""Damage to the directory: files missing, swapped, doubled, replaced by links, pipes, pickles and folders."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal


@dataclass(frozen=True)
class Special:
    """What is no ordinary file."""

    kind: Literal["link", "pipe", "folder"]
    target: str = ""


Entry = bytes | Special

_TARGETS = ("/dev/zero", "/dev/urandom", "/dev/null", "/etc/passwd", "..", ".", "missing", "/proc/self/mem", "/")


class _Bomb:
    """Unpickled, it leaves a file in the working directory."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pickle-was-run",)


def pickle_bytes() -> bytes:
    return pickle.dumps(_Bomb())


def zipped_pickle() -> bytes:
    """What torch.save writes since 1.6: a zip archive with a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes())
    return buffer.getvalue()


def write_entries(entries: dict[str, Entry], folder: Path) -> None:
    for name, entry in entries.items():
        path = folder / name
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif entry.kind == "link":
            path.symlink_to(path.name if entry.target == "itself" else entry.target)
        elif entry.kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


def damage_directory(entries: dict[str, Entry], random: Random) -> str:
    name = random.choice(sorted(entries))
    match random.randrange(9):
        case 0:
            del entries[name]
        case 1:
            other = random.choice(sorted(entries))
            entries[name], entries[other] = entries[other], entries[name]
        case 2:
            entries[name] = Special("link", random.choice([*_TARGETS, "itself"]))
        case 3:
            entries[name] = Special("pipe")
        case 4:
            entries[name] = Special("folder")
        case 5:
            entries[name] = random.choice([pickle_bytes, zipped_pickle])()
        case 6:
            weights = next(each for each in sorted(entries) if each.endswith((".safetensors", ".gguf")))
            entries[random.choice(["pytorch_model.bin", "model.pt", "model.ckpt"])] = pickle_bytes()
            del entries[weights]
        case 7:
            copy = random.choice(["consolidated.safetensors", "model-00001-of-00002.safetensors", "extra.safetensors"])
            entries[copy] = entries[name]
        case _:
            entries["modeling_evil.py"] = b"open('code-was-run', 'w')\nclass Evil: pass\n"
            entries["tokenization_evil.py"] = b"open('code-was-run', 'w')\nclass Evil: pass\n"
    return "directory"
