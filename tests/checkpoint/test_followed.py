"""Files that are hashed while tensors are read from them, in whatever order, by whatever threads."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aphroquant import buffers
from aphroquant.checkpoint import followed, tensor_io
from aphroquant.checkpoint.direct import ALIGNMENT, is_cached
from aphroquant.checkpoint.followed import SourceHashes
from aphroquant.checkpoint.tensor_io import kept_in_cache, read_bytes
from aphroquant.errors import InputError

SIZE = 2**22 + 1234
RANGES = [(8 * number, 8 * number + 2**18) for number in range(0, 2**19, 2**15)]  # one behind the other, and gaps


@pytest.fixture(params=["direct", "cached"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of random bytes, of which even small reads pass the page cache by, or none does."""
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    monkeypatch.setattr(tensor_io, "is_cached", lambda *place: request.param == "cached")
    monkeypatch.setattr(tensor_io, "_READ", 4 * ALIGNMENT)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with buffers.reused():
        yield path


def digest(path: Path) -> tuple[int, str]:
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def read_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes are read for the hash alone: filled as it goes."""
    counts: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, views: list[memoryview], position: int) -> int:
        count = preadv(descriptor, views, position)
        counts.append(count if threading.current_thread().name.startswith(("hashing", "ahead")) else 0)
        return count

    monkeypatch.setattr("aphroquant.checkpoint.direct.os.preadv", counted)
    return counts


def check_range(path: Path, begin: int, end: int) -> None:
    found = read_bytes(path, "tensor", begin, end - begin)
    assert found.numpy().tobytes() == path.read_bytes()[begin:end]
    found.zero_()  # the caller's own


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "some", "none", "one twice"])
def test_the_hash_is_right_in_any_order(order: str, place: Path) -> None:
    ranges = {
        "forward": RANGES,
        "backward": RANGES[::-1],
        "shuffled": random.Random(0).sample(RANGES, len(RANGES)),
        "some": RANGES[3::4],
        "none": [],
        "one twice": [RANGES[1], RANGES[1]],
    }[order]
    with SourceHashes({"x": place}, {place: []}) as hashes:
        for begin, end in ranges:
            check_range(place, begin, end)
        assert hashes.records() == {"x": digest(place)}


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_read_at_once_wait_for_nothing_for_ever(seed: int, place: Path) -> None:
    ranges = random.Random(seed).sample(RANGES * 3, len(RANGES) * 3)
    with SourceHashes({"x": place}, {place: RANGES[:2]}) as hashes, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check_range, place, *each) for each in ranges]:
            done.result()
        assert hashes.records() == {"x": digest(place)}


def test_what_comes_in_order_is_not_read_for_the_hash(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read_here(monkeypatch)
    late = RANGES[0]
    with SourceHashes({"x": place}, {place: [late]}) as hashes:
        for begin, end in [*RANGES[1:], late]:
            check_range(place, begin, end)
        assert hashes.records() == {"x": digest(place)}
    assert sum(here) == SIZE - sum(end - begin for begin, end in RANGES[1:])


def test_a_large_gap_is_left_for_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "_SHORT_GAP", 2**16)
    here = read_here(monkeypatch)
    with SourceHashes({"x": place}, {place: []}) as hashes:
        for begin, end in [(SIZE - 1000, SIZE), *RANGES]:  # as scales that lie behind all codes
            check_range(place, begin, end)
        assert hashes.records() == {"x": digest(place)}
    assert sum(here) == SIZE - sum(end - begin for begin, end in RANGES)


def test_nobody_waits_while_the_hash_is_far_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "_NEAR", 2**16)
    monkeypatch.setattr(followed, "_STEP", 4 * ALIGNMENT)
    here = read_here(monkeypatch)
    begin = 2**20 + 8  # behind an embedding, which comes late
    with SourceHashes({"x": place}, {place: [(8, begin)]}) as hashes:
        hold = threading.Event()
        hashes._following.submit(hold.wait)
        check_range(place, begin, begin + 2**18)
        check_range(place, begin + 2**18, begin + 2**19)
        hold.set()
        check_range(place, 8, begin)
        assert hashes.records() == {"x": digest(place)}
    assert sum(here) >= SIZE  # alone


def test_the_hash_is_followed_again_once_it_is_near(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "_NEAR", 2**16)
    here = read_here(monkeypatch)
    with SourceHashes({"x": place}, {place: [(0, 2**20)]}) as hashes:
        check_range(place, 2**20, 2**20 + 2**12)
        hashes._by_path[place].followed[-1].result()
        check_range(place, 2**20 + 2**12, SIZE)
        assert hashes.records() == {"x": digest(place)}
    assert sum(here) == 2**20 + 2**12


def test_the_rest_of_earlier_files_is_hashed_meanwhile(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(os.urandom(10_000))
    config = tmp_path / "config.json"
    config.write_text("{}")
    files = {path.name: path for path in [*paths, config]}
    with SourceHashes(files, {path: [] for path in paths}) as hashes:
        for path in [*paths, paths[0]]:
            check_range(path, 5000, 6000)
        assert hashes._files["0"].record is not None
        assert hashes._files["3"].record is None
        assert hashes.records() == {name: digest(path) for name, path in files.items()}


@pytest.mark.parametrize("begin", [0, 8, 4096, SIZE - 50_002, 3])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 50_000])
def test_a_range_at_any_place_is_read(begin: int, nbytes: int, place: Path) -> None:
    with SourceHashes({"x": place}, {place: []}) as hashes:
        check_range(place, begin, begin + nbytes)
        assert hashes.records() == {"x": digest(place)}


def test_a_file_that_is_too_short_is_told_and_stops_nobody(place: Path) -> None:
    with SourceHashes({"x": place}, {place: []}) as hashes:
        os.truncate(place, 2**21 + 1)
        with pytest.raises(InputError, match=r"file: tensor: the file ends 2097151 bytes too early"):
            read_bytes(place, "tensor", 0, 2**22)
        with pytest.raises(InputError, match="file: the file has become shorter while it was read"):
            hashes.records()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with (
        SourceHashes({"gone": tmp_path / "gone"}, {tmp_path / "gone": []}) as hashes,
        pytest.raises(InputError, match="gone: cannot be read"),
    ):
        hashes.records()


def test_leaving_early_waits_for_no_file(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    before = threading.active_count()
    with SourceHashes({"large": tmp_path / "large", "other": tmp_path / "large"}, {}):
        pass
    assert threading.active_count() == before
    assert not followed._ACTIVE


def test_what_will_be_read_again_stays_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**23))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(file.fileno(), 0, 2**23):
            pytest.skip("this file system keeps its files in memory")
        with buffers.reused(), SourceHashes({"x": path}, {path: []}):
            read_bytes(path, "tensor", 0, 2**22)
            assert not is_cached(file.fileno(), 0, 2**22)
            with kept_in_cache():
                read_bytes(path, "tensor", 2**22, 2**22)
            assert is_cached(file.fileno(), 2**22, 2**22)
