"""Hashes of files, whole ones and one that grows."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from aphroquant.checkpoint.hashes import FileHashes, GrowingFileHash
from aphroquant.errors import InputError


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_files_of_any_size_are_hashed(tmp_path: Path) -> None:
    contents = {str(size): os.urandom(size) for size in (0, 1, 2**22, 2**22 + 1)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with FileHashes({name: tmp_path / name for name in contents}) as hashes:
        found = hashes.records()
    assert found == {name: (len(content), digest(content)) for name, content in contents.items()}


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with FileHashes({"gone": tmp_path / "gone"}) as hashes, pytest.raises(InputError, match="gone: cannot be read"):
        hashes.records()


def test_leaving_early_waits_for_no_file(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    before = threading.active_count()
    with FileHashes({"large": tmp_path / "large", "next": tmp_path / "large"}):
        pass
    assert threading.active_count() == before


def test_a_growing_file_is_hashed_up_to_where_it_is_written(tmp_path: Path) -> None:
    content = os.urandom(3 * 2**22 + 7)
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        growing = GrowingFileHash(file.fileno())
        for begin in range(0, len(content), 2**20):
            file.write(content[begin : begin + 2**20])
            if begin % 2**21:
                growing.reached(begin)
        assert growing.record(len(content)) == (len(content), digest(content))


def test_a_file_shorter_than_said_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        growing = GrowingFileHash(file.fileno())
        with pytest.raises(OSError, match="shorter"):
            growing.record(5)
        growing.stop()


def test_stopping_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with (tmp_path / "file").open("wb+") as file:
        GrowingFileHash(file.fileno()).stop()
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_gives_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr("aphroquant.checkpoint.hashes.os.preadv", refuse)
    with (tmp_path / "file").open("wb+") as file:
        growing = GrowingFileHash(file.fileno())
        with pytest.raises(MemoryError):
            growing.record(5)
