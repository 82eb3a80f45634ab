"""Compiled kernels on disk: one file a kernel, whole or not there, made once even by many processes.

The folder is $APHROQUANT_CACHE/kernels, or ~/.cache/aphroquant/kernels ($XDG_CACHE_HOME is respected). A file starts
with a magic line and a SHA-256 of what follows, so that one that was cut short or changed is found out and made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

_MAGIC = b"aphroquant kernel 1\n"


@dataclass(frozen=True)
class Entry:
    """A compiled kernel and what the compiler said of it."""

    cubin: bytes
    log: str
    description: str

    def to_bytes(self) -> bytes:
        header = json.dumps({"log": self.log, "description": self.description}).encode()
        body = len(header).to_bytes(4, "little") + header + self.cubin
        return _MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry | None:
        """None if these are not the bytes that `to_bytes` made."""
        start = len(_MAGIC) + 32
        body = data[start:]
        if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
            return None
        header_len = int.from_bytes(body[:4], "little")
        return cls(body[4 + header_len :], **json.loads(body[4 : 4 + header_len]))


def cache_folder() -> Path:
    """Where compiled kernels are kept; it need not exist."""
    if chosen := os.environ.get("APHROQUANT_CACHE"):
        return Path(chosen).expanduser() / "kernels"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "aphroquant" / "kernels"


def cached(key: str, make: Callable[[], Entry]) -> Entry:
    """The entry of that key, from the disk if it is there whole, else made and stored."""
    folder = cache_folder()
    path = folder / f"{key}.cubin"
    if found := _read(path):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _Lock(folder / f"{key}.lock")
    except OSError as error:
        _warn(folder, error)
        return make()
    with lock:
        if found := _read(path):  # another process made it while this one waited
            return found
        entry = make()
        try:
            _replace(path, entry.to_bytes())
        except OSError as error:
            _warn(folder, error)
        return entry


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept in {folder} ({error.strerror or error}): every process compiles them again; "
        "set APHROQUANT_CACHE to a folder that can be written",
        RuntimeWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class CacheState:
    """What lies in the cache folder."""

    folder: str
    writable: bool
    num_kernels: int
    num_bytes: int
    num_damaged: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cache_state() -> CacheState:
    """Counts what is there, reading every file."""
    folder = cache_folder()
    paths = sorted(folder.glob("*.cubin")) if folder.is_dir() else []
    damaged = sum(_read(path) is None for path in paths)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    num_bytes = sum(path.stat().st_size for path in paths)
    return CacheState(str(folder), writable, len(paths) - damaged, num_bytes, damaged)


def _read(path: Path) -> Entry | None:
    try:
        return Entry.from_bytes(path.read_bytes())
    except OSError:  # not there, or not readable: made again
        return None


class _Lock:
    """An exclusive lock among processes and threads. The operating system frees it when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            os.close(self._handle)
            raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)


def _replace(path: Path, data: bytes) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
