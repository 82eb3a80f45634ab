"""What was recorded of an output: aphroquant.json and the check sums, in a directory or beside a single file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aphroquant.checkpoint.base import read_json
from aphroquant.errors import InputError
from aphroquant.provenance import checksums

MANIFEST = "aphroquant.json"
MANIFEST_SUFFIX = f".{MANIFEST}"  # after a single file's name
SIGNATURE = "model.sig"
SIGNATURE_SUFFIX = ".sig"
CARD = "README.md"


@dataclass(frozen=True)
class OutputRecord:
    """The records of `path`, a directory or a single file. They are read when they are asked for."""

    path: Path

    @property
    def directory(self) -> Path:
        """Where the recorded names are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def manifest_path(self) -> Path:
        return self.path / MANIFEST if self.path.is_dir() else self._beside(MANIFEST_SUFFIX)

    @property
    def sums_path(self) -> Path:
        return self.path / checksums.FILE_NAME if self.path.is_dir() else self._beside(checksums.FILE_SUFFIX)

    @property
    def signature_path(self) -> Path:
        return self.path / SIGNATURE if self.path.is_dir() else self._beside(SIGNATURE_SUFFIX)

    @property
    def exists(self) -> bool:
        return self.manifest_path.exists() or self.sums_path.exists()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """aphroquant.json; empty if there is none."""
        return read_json(self.manifest_path) if self.manifest_path.exists() else {}

    def section(self, name: str) -> dict[str, Any]:
        """One part of the manifest; empty if it is not there. InputError if it is something else than an object."""
        found = self.manifest.get(name)
        if found is not None and not isinstance(found, dict):
            raise InputError(f"{self.manifest_path}: {name} must be an object, not {type(found).__name__}")
        return found or {}

    @cached_property
    def sums(self) -> Mapping[str, str]:
        """SHA-256 by file name, out of the check sums; empty if there are none."""
        found = checksums.read_sums(self.sums_path) if self.sums_path.exists() else {}
        return self._renamed(found)

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 by file name, out of the manifest."""
        found = {}
        for name, entry in self.section("files").items():
            sha256 = entry.get("sha256") if isinstance(entry, dict) else entry
            checksums.check_name(self.manifest_path, name)
            if not isinstance(sha256, str):
                raise InputError(f"{self.manifest_path}: files: {name} has no sha256")
            found[name] = sha256.lower()
        return self._renamed(found)

    def tensor_sums(self, file: str) -> Mapping[str, str]:
        """CRC-32 of each tensor in a file, as far as they were recorded."""
        sums = self._renamed(self.section("tensor_crc32")).get(file)
        return sums if isinstance(sums, dict) else {}

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _renamed(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of a single file, which may have another name by now: under the name that it has."""
        if self.path.is_dir() or len(found) != 1:
            return found
        return {self.path.name: next(iter(found.values()))}


def find_records(path: Path) -> list[OutputRecord]:
    """The records of a directory or a file; those of the single files in a directory that has none of its own.

    InputError if there are none.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such file or directory", hint="give the directory or .gguf file that convert made"
        )
    own = OutputRecord(path)
    found = [own] if own.exists else list(records_of_files(path)) if path.is_dir() else []
    if not found:
        raise InputError(
            f"{path}: there is no {own.manifest_path.name} and no {own.sums_path.name}: nothing says what it was",
            hint="only what aphroquant convert has written, or what has SHA256SUMS, can be verified",
        )
    return found


def records_of_files(directory: Path) -> Iterator[OutputRecord]:
    """Those of the single files in a directory."""
    for path in sorted(directory.iterdir()):
        if path.name.endswith(MANIFEST_SUFFIX) and path.name != MANIFEST_SUFFIX:
            yield OutputRecord(path.with_name(path.name.removesuffix(MANIFEST_SUFFIX)))
