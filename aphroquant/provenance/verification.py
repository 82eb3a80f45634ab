"""verify_files(): whether the files of an output are those that were recorded, and if not, what exactly differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aphroquant.checkpoint.files import opened
from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.checkpoint.hashes import Span, TensorSums
from aphroquant.checkpoint.safetensors_header import read_header
from aphroquant.errors import InputError
from aphroquant.provenance.records import OutputRecord, find_records

OnProgress = Callable[[int, int], None]  # bytes read, bytes in all

_STEP = 2**22


@dataclass(frozen=True)
class FileDifference:
    """One file that is not what was recorded. `tensors` are those in it that differ, as far as that is known."""

    file: str
    kind: Literal["missing", "changed", "extra", "contradiction"]
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileVerification:
    """Everything that differs, by file."""

    path: str
    num_files: int
    num_bytes: int
    differences: tuple[FileDifference, ...]

    @property
    def passed(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}


def verify_files(path: str | Path, on_progress: OnProgress | None = None) -> FileVerification:
    """Hash every file that aphroquant.json and SHA256SUMS name, and look for others.

    `path` is a directory or a single file. InputError if nothing was recorded of it, or the records cannot be read.
    """
    path = Path(path).expanduser()
    records = find_records(path)
    sizes = {record.path: sum(map(_size, _paths(record).values())) for record in records}
    read, total = 0, sum(sizes.values())

    def add(count: int) -> None:
        nonlocal read
        read += count
        if on_progress is not None:
            on_progress(read, total)

    differences: list[FileDifference] = []
    for record in records:
        for name, file in _paths(record).items():
            differences += _file_differences(record, name, file, add)
        differences += _extra_files(record)
    count = sum(len(_paths(record)) for record in records)
    return FileVerification(str(path), count, total, tuple(differences))


def _paths(record: OutputRecord) -> dict[str, Path]:
    """The recorded files, by name."""
    return {name: record.directory / name for name in sorted({*record.sums, *record.hashes})}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _file_differences(
    record: OutputRecord, name: str, path: Path, on_bytes: Callable[[int], None]
) -> Iterator[FileDifference]:
    wanted = {text: hashes[name] for text, hashes in _sources(record).items() if name in hashes}
    if not path.exists():
        yield FileDifference(name, "missing", f"is not there, and {' and '.join(wanted)} names it")
        return
    if not path.is_file():
        yield FileDifference(name, "changed", "is no ordinary file")
        return
    if len(set(wanted.values())) > 1:
        told = "; ".join(f"{text} says {sha256}" for text, sha256 in wanted.items())
        yield FileDifference(name, "contradiction", f"has two recorded hashes: {told}")
    found = sha256_of(path, on_bytes)
    others = [text for text, sha256 in wanted.items() if sha256 != found]
    if others:
        tensors, words = _changed_tensors(path, record.tensor_sums(name))
        message = f"its SHA-256 is {found}, and {wanted[others[0]]} in {' and '.join(others)}"
        yield FileDifference(name, "changed", "; ".join([message, *words]), tensors)


def _sources(record: OutputRecord) -> dict[str, Mapping[str, str]]:
    return {record.sums_path.name: record.sums, record.manifest_path.name: record.hashes}


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of an ordinary file. `on_bytes` is told how many bytes were read each time."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_STEP))
    with opened(path) as (file, _):
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()


def _changed_tensors(path: Path, recorded: Mapping[str, str]) -> tuple[tuple[str, ...], list[str]]:
    """The tensors of a changed file that differ, and what else is to be said of them."""
    if not recorded:
        return (), []
    try:
        found = _tensor_sums(path)
    except InputError as error:
        return (), [f"its tensors cannot be told apart: {error.message.removeprefix(f'{path}: ')}"]
    changed = tuple(name for name, value in recorded.items() if name in found and found[name] != value)
    missing = [name for name in recorded if name not in found]
    added = [name for name in found if name not in recorded]
    told = [f"{len(changed)} of {len(recorded)} tensors differ"] if changed else []
    told += [f"the tensor {name} is missing" for name in missing] + [f"the tensor {name} is new" for name in added]
    if not told:
        told = ["the bytes of all its tensors are as they were: names, shapes, types or metadata in its header differ"]
    return changed, told


def _tensor_sums(path: Path) -> dict[str, str]:
    sums, buffer, position = TensorSums(_spans(path)), memoryview(bytearray(_STEP)), 0
    with opened(path) as (file, _):
        while count := file.readinto(buffer):
            sums.update(position, buffer[:count])
            position += count
    return sums.sums()


def _spans(path: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors or GGUF file are."""
    if path.suffix == ".safetensors":
        return {name: Span(tensor.begin, tensor.nbytes) for name, tensor in read_header(path).tensors.items()}
    return {name: Span(tensor.begin, tensor.nbytes) for name, tensor in read_gguf_header(path).tensors.items()}


def _extra_files(record: OutputRecord) -> Iterator[FileDifference]:
    """Files in a directory that no record names. Hidden ones (.git, .cache) are no part of a model."""
    if not record.path.is_dir():
        return
    known = {*_paths(record), record.sums_path.name, record.manifest_path.name, record.signature_path.name}
    for folder, folders, names in os.walk(record.path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            inside = (Path(folder) / name).relative_to(record.path).as_posix()
            if not name.startswith(".") and inside not in known:
                yield FileDifference(inside, "extra", "is in no record")
