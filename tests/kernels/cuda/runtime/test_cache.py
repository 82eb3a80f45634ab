"""The cache of compiled kernels: made once, whole or not at all, and never in the way."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

from aphroquant.kernels.cuda import cache
from aphroquant.kernels.cuda.cache import Entry, cache_folder, cache_state, cached

ENTRY = Entry(b"\x7fELF machine code", "Used 3 registers", "kernel for sm_90a")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APHROQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def _never() -> Entry:
    raise AssertionError("made a second time")


def test_an_entry_is_made_once_and_read_afterwards(folder: Path) -> None:
    assert cached("key", lambda: ENTRY) == ENTRY
    assert cached("key", _never) == ENTRY
    assert [path.name for path in sorted(folder.iterdir())] == ["key.cubin", "key.lock"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_found_out_and_made_again(folder: Path, damage: str) -> None:
    cached("key", lambda: ENTRY)
    path = folder / "key.cubin"
    good = path.read_bytes()
    bad = {
        "truncated": good[:-1],
        "flipped": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "empty": b"",
        "other": b"no kernel at all, but long enough to hold a header of the size that is expected",
    }
    path.write_bytes(bad[damage])
    assert cache_state().num_damaged == 1
    assert cached("key", lambda: ENTRY) == ENTRY
    assert path.read_bytes() == good
    assert (cache_state().num_kernels, cache_state().num_damaged) == (1, 0)


def test_a_failed_compilation_leaves_nothing_and_the_next_one_tries_again(folder: Path) -> None:
    def fail() -> Entry:
        raise ValueError("does not compile")

    with pytest.raises(ValueError, match="does not compile"):
        cached("key", fail)
    assert not (folder / "key.cubin").exists()
    assert cached("key", lambda: ENTRY) == ENTRY


def test_threads_that_want_the_same_kernel_wait_for_the_first(folder: Path) -> None:
    made, started = [], threading.Barrier(6)

    def make() -> Entry:
        made.append(threading.get_ident())
        return ENTRY

    def want() -> None:
        started.wait()
        assert cached("key", make) == ENTRY

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def _make_in_a_process(counter: Path) -> None:
    def make() -> Entry:
        with counter.open("a") as file:
            file.write("x")
        return ENTRY

    assert cached("key", make) == ENTRY


def test_processes_that_want_the_same_kernel_wait_for_the_first(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_make_in_a_process, args=(counter,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert counter.read_text() == "x"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("APHROQUANT_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept in .*set APHROQUANT_CACHE"):
        assert cached("key", lambda: ENTRY) == ENTRY
    assert not cache_state().writable


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APHROQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/aphroquant/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "aphroquant" / "kernels"


def test_a_file_system_without_locks_costs_a_warning_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="No locks available"):
        assert cached("key", lambda: ENTRY) == ENTRY
