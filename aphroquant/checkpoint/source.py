"""From what a user types to a checkpoint: a directory, a file, or a Hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from aphroquant.checkpoint.base import Checkpoint
from aphroquant.checkpoint.directory import SafetensorsCheckpoint
from aphroquant.checkpoint.files import PICKLE_SUFFIXES, opened, pickle_error
from aphroquant.errors import InputError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_GGUF_MAGIC = b"GGUF"
_WHAT_TO_GIVE = "a directory, a .gguf or .safetensors file, or a Hugging Face id such as org/name"


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `source` names: a directory, a .gguf or .safetensors file, or a Hub id "org/name".

    `revision` is a branch, tag or commit of a Hub repository. Only headers are read.
    """
    if not str(source).strip():
        raise UsageError("no checkpoint is given: its name is empty", hint=f"give {_WHAT_TO_GIVE}")
    path = Path(source).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(str(source)):
            raise _no_such_path(path, str(source))
        from aphroquant.checkpoint.hub import download

        path = download(str(source), revision, alternative=_close_sibling(path))
    if path.is_dir():
        return SafetensorsCheckpoint(path, str(source))
    if path.suffix == ".gguf" or _starts_with_magic(path):
        from aphroquant.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path, str(source))
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, str(source))
    raise _not_a_checkpoint(path)


def _starts_with_magic(path: Path) -> bool:
    with opened(path) as (file, _):
        return file.read(4) == _GGUF_MAGIC


def _not_a_checkpoint(path: Path) -> InputError:
    if path.suffix in PICKLE_SUFFIXES:
        return pickle_error(path)
    if path.name.endswith(".json"):
        return InputError(f"{path}: is not a checkpoint", hint=f"give the directory: {path.parent}")
    return InputError(f"{path}: is neither a directory nor a .gguf or .safetensors file")


def _no_such_path(path: Path, source: str) -> InputError:
    sibling = _close_sibling(path)
    hint = f"give {_WHAT_TO_GIVE}" if sibling is None else f"did you mean {sibling}?"
    return InputError(f"{source}: no such file or directory, and not a Hugging Face id", hint=hint)


def _close_sibling(path: Path) -> Path | None:
    """The nearest existing path with a similar last name."""
    try:
        names = [sibling.name for sibling in path.parent.iterdir()]
    except OSError:
        return None  # no such folder either: nothing to suggest
    close = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / close[0] if close else None
