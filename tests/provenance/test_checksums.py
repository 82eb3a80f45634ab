"""SHA256SUMS as coreutils writes and checks it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from aphroquant.errors import InputError
from aphroquant.provenance.checksums import read_sums, sums_text

NAMES = ("model.safetensors", "folder/a b.json", "back\\slash", "two\nlines", "return\r", " blanks ", "é.txt")


def write_files(directory: Path) -> dict[str, str]:
    hashes = {}
    for name in NAMES:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    return hashes


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils' sha256sum is not there")
def test_sha256sum_checks_what_is_written_and_what_it_writes_is_read(tmp_path: Path) -> None:
    hashes = write_files(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(sums_text(hashes), newline="")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    theirs = subprocess.run(["sha256sum", "--", *NAMES], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "theirs").write_bytes(theirs.stdout)
    assert read_sums(tmp_path / "theirs") == hashes


def test_writing_and_reading_are_inverse(tmp_path: Path) -> None:
    hashes = write_files(tmp_path)
    (tmp_path / "SHA256SUMS").write_bytes(sums_text(hashes).encode())
    assert read_sums(tmp_path / "SHA256SUMS") == hashes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no hash at all\n", "line 1 is no SHA-256 and a file name"),
        (b"0" * 64 + b"  a\n" + b"1" * 64 + b"  a\n", "gives two hashes for a"),
        (b"0" * 64 + b"  ../outside\n", "is no name of a file beside it"),
        (b"0" * 64 + b"  /etc/passwd\n", "is no name of a file beside it"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_cannot_be_trusted_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_sums(tmp_path / "SHA256SUMS")
