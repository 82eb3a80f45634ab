"""Files written in order past the page cache: what is on the disk is what was meant, and its hash."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, direct, hashes, open_checkpoint, shard, stream
from aphroquant.checkpoint.hashes import FileDigest, Span
from aphroquant.checkpoint.shard import Promised
from aphroquant.checkpoint.stream import ALIGNMENT, OutputStream
from aphroquant.errors import ResourceError

SMALL = 2 * ALIGNMENT


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks small enough for several of them to be under way in a file of some kilobytes."""
    monkeypatch.setattr(stream, "CHUNK", SMALL)


def random_bytes(count: int) -> Tensor:
    return torch.frombuffer(bytearray(os.urandom(count)), dtype=torch.uint8) if count else torch.empty(0).byte()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def opened(path: Path, digest: FileDigest | None = None) -> Iterator[OutputStream]:
    with path.open("wb+", buffering=0) as file:
        written = OutputStream(file.fileno(), path, 0, digest=digest)
        try:
            yield written
        finally:
            written.close()


@pytest.mark.parametrize("count", [0, 1, SMALL - 1, SMALL, SMALL + 1, 30 * SMALL, 30 * SMALL + 4097])
@pytest.mark.parametrize("step", [1000, SMALL, 5 * SMALL + 3])
def test_what_is_appended_is_in_the_file_and_in_its_hash(count: int, step: int, tmp_path: Path) -> None:
    content = random_bytes(count)
    digest = FileDigest({"begin": Span(4, count // 2), "end": Span(4 + count // 2, count - count // 2)})
    digest.update(memoryview(b"head"))
    with opened(tmp_path / "file", digest) as written:
        for part in content.split(step):
            again = part.clone()
            written.write(again)
            again.zero_()  # the caller's own
        written.finish()
        assert written.position == count
    stored = (tmp_path / "file").read_bytes()
    assert stored == content.numpy().tobytes()
    assert digest.record() == (4 + count, hashlib.sha256(b"head" + stored).hexdigest())
    halves = {"begin": stored[: count // 2], "end": stored[count // 2 :]}
    assert digest.tensor_sums() == {name: f"{zlib.crc32(half):08x}" for name, half in halves.items()}


def test_a_stream_of_threads_leaves_none(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(tmp_path / "file") as written:
        written.write(random_bytes(40 * SMALL))
    assert threading.active_count() == before


@pytest.mark.parametrize("refused", ["when it is asked for", "when blocks are written"])
def test_a_file_system_without_direct_access_is_written_through_the_cache(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, asked = direct.fcntl.fcntl, []
    passing = set()

    def fcntl(descriptor: int, command: int, flags: int = 0) -> int:
        if command != direct.fcntl.F_SETFL:
            return ours(descriptor, command) & ~os.O_DIRECT
        asked.append(flags)
        if flags & os.O_DIRECT:
            if refused == "when it is asked for":
                raise OSError(errno.EINVAL, "Invalid argument")
            passing.add(descriptor)
        else:
            passing.discard(descriptor)
        return 0

    def pwrite(descriptor: int, content: memoryview, position: int) -> int:
        if descriptor in passing:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, content, position)

    write = os.pwrite
    monkeypatch.setattr(direct.fcntl, "fcntl", fcntl)
    monkeypatch.setattr("aphroquant.checkpoint.tensor_io.os.pwrite", pwrite)
    content = random_bytes(20 * SMALL + 5)
    with opened(tmp_path / "file") as written:
        written.write(content)
        written.finish()
    assert asked
    assert (tmp_path / "file").read_bytes() == content.numpy().tobytes()


def test_a_disk_that_gives_back_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(descriptor: int, content: memoryview, position: int) -> int:
        if position == 3 * SMALL:
            content = memoryview(bytes([content[0] ^ 1]) + bytes(content[1:]))
            return write(flawed, content, position)
        return write(descriptor, content, position)

    write = os.pwrite
    monkeypatch.setattr("aphroquant.checkpoint.tensor_io.os.pwrite", damaged)
    with opened(tmp_path / "file") as written:
        flawed = os.open(tmp_path / "file", os.O_WRONLY)  # which does not care where the bytes are in memory
        with pytest.raises(ResourceError, match="file: what was written is not what can be read back"):
            written.write(random_bytes(40 * SMALL))
        os.close(flawed)


def test_a_disk_that_fills_up_is_told_before_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: memoryview, position: int) -> int:
        if position >= 5 * SMALL:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, position)

    write = os.pwrite
    monkeypatch.setattr("aphroquant.checkpoint.tensor_io.os.pwrite", full)
    with (
        pytest.raises(ResourceError, match="the disk is full"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        writer.add("x", random_bytes(2**20))
    assert list(tmp_path.iterdir()) == []


TENSORS = {
    "wide": torch.randn(64, 64, dtype=torch.float64),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(31).half(),
    "matrix": torch.randn(200, 100).bfloat16(),
    "last": torch.randn(50, 50),
}
ALL = [Promised(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
OTHERS = {
    "kept": ALL,
    "none": [],
    "one too few": ALL[:-1],
    "one too many": [*ALL, Promised("more", torch.float32, (2,))],
    "another order": ALL[::-1],
    "another shape": [*ALL[:-1], Promised("last", torch.float32, (25, 100))],
}


@pytest.mark.parametrize("shard_bytes", [2**30, 40_000])
@pytest.mark.parametrize("promise", OTHERS)
def test_hashes_are_right_whatever_was_promised(
    promise: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SMALL_BYTES", 0)
    read: list[Path] = []
    record = hashes.FileHashes._record
    monkeypatch.setattr(hashes.FileHashes, "_record", lambda *given: read.append(given[1]) or record(*given))
    with CheckpointWriter(tmp_path / "out", shard_bytes=shard_bytes, hashed=True) as writer:
        writer.promise(OTHERS[promise])
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        told, sums = writer.records({}), writer.tensor_sums()
        writer.finish({})
    for name, found in told.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert found == (len(content), hashlib.sha256(content).hexdigest())
    assert any(path.name.startswith("shard-") for path in read) == (promise != "kept")
    checkpoint = open_checkpoint(tmp_path / "out")
    found_sums = {name: value for tensors in sums.values() for name, value in tensors.items()}
    assert found_sums == {name: f"{zlib.crc32(bytes_of(tensor)):08x}" for name, tensor in TENSORS.items()}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
