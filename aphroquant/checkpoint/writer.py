"""Writing a checkpoint so that a directory of its name is either complete or not there.

Everything goes into a hidden sibling directory that is renamed at the very end, after its files are on the disk
(fsync). Tensors go to the disk as they come (`shard.py`), so memory holds one of them, or a piece of it, at a time. The
number in `model-00001-of-0000n` is known only at the end, so shards get their names then; the index follows, and
config.json, which makes a directory a checkpoint, is last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from aphroquant.checkpoint.carried import TEMPLATES_FOLDER
from aphroquant.checkpoint.disk import check_parents, fsync, telling_disk_errors
from aphroquant.checkpoint.hashes import FileHashes, FileRecord, Span
from aphroquant.checkpoint.leftovers import claim, partial_path, remove_leftovers, replaced_path
from aphroquant.checkpoint.safetensors_header import DTYPE_NAMES, read_header
from aphroquant.checkpoint.shard import Promised, Shard, split_promises
from aphroquant.errors import InputError, UsageError

DEFAULT_SHARD_BYTES = 5 * 2**30
_RESERVED = ("config.json", "model.safetensors.index.json")


class CheckpointWriter:
    """Writes `directory` atomically. Use as a context manager and end with `finish`; leaving without it, or on an
    exception, removes what was written. An existing checkpoint is replaced only with `overwrite`, by the last rename.
    `removed` says what killed writers of the same name had left. With `hashed`, `records` tells the files' hashes, and
    `tensor_sums` the check sums of the tensors in them; `promise` saves reading what was written for them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        hashed: bool = False,
    ) -> None:
        if shard_bytes < 1:
            raise UsageError(f"shard_bytes = {shard_bytes} must be positive")
        self.directory = Path(directory).expanduser().resolve()  # through a link, so that its target is replaced
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._partial = partial_path(self.directory)
        self._lock: int | None = None
        self.removed: list[str] = []
        self._open: Shard | None = None
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._shard_names: dict[str, str] = {}  # by those that the shards have until all are there
        self._hashes = FileHashes() if hashed else None
        self._promised: list[list[Promised]] = []  # by shard
        with self._full_disk_told():
            self._check_target()

    def __enter__(self) -> Self:
        with self._full_disk_told():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.removed = remove_leftovers(self.directory)
            self._partial.mkdir(exist_ok=True)
            self._lock = os.open(self._partial, os.O_RDONLY)
            claim(self._lock, self.directory)
            self._check_target()  # an old one may have come back
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hashes is not None:
            self._hashes.stop()
        if self._open is not None:
            self._open.close()
            self._open = None
        shutil.rmtree(self._partial, ignore_errors=True)  # after finish it is gone already
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def promise(self, tensors: Iterable[Promised]) -> None:
        """Say what will be added, in this order, if it is known: then shards are hashed while they are written. Nothing
        is wrong if it comes otherwise."""
        self._promised = split_promises(tensors, self._shard_bytes) if self._hashes is not None else []

    def add(self, name: str, tensor: Tensor) -> None:
        """Store one tensor, which may change when this returns."""
        self.add_pieces(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_pieces(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """Store one tensor from consecutive pieces of its elements, so that it is never whole in memory."""
        assert name not in self._names, f"{name} was added before"
        assert dtype in DTYPE_NAMES, f"{name}: safetensors has no {dtype}"
        self._names.add(name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        with self._full_disk_told():
            if self._open is not None and self._open.nbytes + nbytes > self._shard_bytes:
                self._close_shard()
            if self._open is None:
                self._open = self._new_shard()
            self._open.append(name, dtype, shape, pieces)

    def add_file(self, source: Path, name: str | None = None) -> None:
        """Copy a file into the checkpoint, as `name` or under its own name."""
        target = self._file(source.name if name is None else name)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise InputError(f"{source}: cannot be read: {error.strerror or error}") from error
        with self._full_disk_told():
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write `value` as the file `name`."""
        return self.write_text(name, json_text(value))

    def write_text(self, name: str, text: str) -> FileRecord:
        """Write the file `name`, in UTF-8."""
        path, content = self._file(name), text.encode()
        with self._full_disk_told():
            path.write_bytes(content)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())

    def records(self, config: dict[str, Any]) -> dict[str, FileRecord]:
        """What every file is once `finish` has written `config`; what is added afterwards is not among them."""
        assert self._hashes is not None, "the writer was not asked to hash"
        self._close_shard()
        shards = self._hashes.records()  # before they get other names
        with self._full_disk_told():
            self._name_shards()
        files = {path.relative_to(self._partial).as_posix(): path for path in self._partial.rglob("*")}
        others = {name: path for name, path in files.items() if path.is_file() and not name.endswith(".safetensors")}
        with FileHashes(others) as small:
            found = small.records() | {self._shard_names[name]: record for name, record in shards.items()}
        text = json_text(config).encode()
        found["config.json"] = FileRecord(len(text), hashlib.sha256(text).hexdigest())
        return dict(sorted(found.items()))

    def tensor_sums(self) -> dict[str, dict[str, str]]:
        """File -> tensor -> CRC-32 of its bytes, once `records` has been asked for."""
        assert self._hashes is not None, "the writer was not asked to hash"
        return {name: self._hashes.tensor_sums(shard) for shard, name in self._shard_names.items()}

    def finish(self, config: dict[str, Any]) -> Path:
        """Complete the checkpoint with `config` as its config.json, put it into place, and return its path."""
        self._close_shard()
        with self._full_disk_told():
            self._name_shards()
            for path in self._partial.rglob("*"):
                fsync(path)
            self._write_json(self._partial / "config.json", config)
            fsync(self._partial / "config.json")
            fsync(self._partial)
            self._check_target()  # someone may have been here meanwhile
            self._put_into_place()
            fsync(self.directory.parent)
        return self.directory

    def _check_target(self) -> None:
        target = self.directory
        if not target.name:
            raise UsageError(f"{target} cannot be an output directory")
        if not target.exists():
            check_parents(target)
            return
        if not target.is_dir():
            raise UsageError(f"{target} exists and is not a directory")
        names = [path.name for path in target.iterdir()]
        if not names:
            return
        if not self._overwrite:
            raise UsageError(
                f"{target} exists and is not empty", hint="give another --out, or --overwrite to replace it"
            )
        if not any(name == "config.json" or name.endswith(".safetensors") for name in names):
            raise UsageError(
                f"{target} does not look like a checkpoint (no config.json, no .safetensors) and is not overwritten",
                hint="give another --out, or remove the directory yourself",
            )

    def _file(self, name: str) -> Path:
        """Where a carried file goes. Names with folders (but that of templates) and of weights are refused."""
        *folders, last = name.split("/")
        allowed = folders in ([], [TEMPLATES_FOLDER]) and Path(last).name == last and last not in (".", "..")
        if not allowed or name in _RESERVED or name.endswith(".safetensors"):
            raise InputError(f"{name!r} cannot be the name of a file carried into {self.directory}")
        return self._partial / name

    def _write_json(self, path: Path, value: Any) -> None:
        with self._full_disk_told():
            path.write_text(json_text(value), encoding="utf-8")

    def _new_shard(self) -> Shard:
        number = len(self._shards)
        promised = self._promised[number] if number < len(self._promised) else ()
        return Shard(self._partial / f"shard-{number + 1:05d}", promised)

    def _close_shard(self) -> None:
        if self._open is None:
            return
        with self._full_disk_told():
            self._open.finish()
        if self._hashes is not None and self._open.digest is not None:
            self._hashes.add_known(self._open.path.name, self._open.digest)
        elif self._hashes is not None:
            tensors = read_header(self._open.path).tensors
            spans = {name: Span(tensor.begin, tensor.nbytes) for name, tensor in tensors.items()}
            self._hashes.add(self._open.path.name, self._open.path, spans)
        self._shards.append(self._open)
        self._open = None

    def _name_shards(self) -> None:
        if self._shard_names:
            return
        count, weight_map = len(self._shards), {}
        for number, shard in enumerate(self._shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_names[shard.path.name] = name
            shard.path.rename(self._partial / name)
            weight_map.update(dict.fromkeys(shard.names, name))
        if count <= 1:
            return
        total = sum(shard.nbytes for shard in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json(self._partial / "model.safetensors.index.json", index)

    def _put_into_place(self) -> None:
        """Rename; an old directory steps aside first, and comes back if its successor cannot take its place."""
        if not self.directory.exists():
            self._partial.rename(self.directory)
            return
        replaced = replaced_path(self.directory)
        self.directory.rename(replaced)
        try:
            self._partial.rename(self.directory)
        except BaseException:
            replaced.rename(self.directory)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _full_disk_told(self) -> AbstractContextManager[None]:
        return telling_disk_errors(self.directory, self._written)

    def _written(self) -> int:
        return sum(shard.nbytes for shard in [*self._shards, self._open] if shard is not None)


def json_text(value: Any) -> str:
    """A JSON file as this writer writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
