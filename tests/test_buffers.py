"""Memory that is used again: the same addresses, never two tensors in one place, nothing kept in the end."""

from __future__ import annotations

import threading

import pytest
import torch

from aphroquant import buffers

MEGABYTES = 2**20


def test_memory_of_a_tensor_that_is_gone_is_used_for_the_next_of_its_size() -> None:
    with buffers.reused():
        first = buffers.empty((4, MEGABYTES), torch.uint8)
        place = first.data_ptr()
        second = buffers.empty((4, MEGABYTES), torch.uint8)
        assert second.data_ptr() != place
        view = first.view(torch.float32)[1:]
        del first
        third = buffers.empty((4, MEGABYTES), torch.uint8)
        assert third.data_ptr() != place  # the view still holds it
        del view
        assert buffers.empty((1, MEGABYTES), torch.float32).data_ptr() == place
        assert buffers.empty((7, MEGABYTES // 2), torch.uint8).data_ptr() == place  # a little smaller


def test_large_memory_is_not_wasted_on_small_tensors() -> None:
    with buffers.reused():
        place = buffers.empty((8, MEGABYTES), torch.uint8).data_ptr()
        assert buffers.empty((4, MEGABYTES), torch.uint8).data_ptr() != place
        assert buffers.empty((8, MEGABYTES), torch.uint8).data_ptr() == place


def test_free_memory_beyond_the_limit_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT", 6 * MEGABYTES)
    with buffers.reused():
        held = [buffers.empty((2, MEGABYTES), torch.uint8) for _ in range(4)]
        assert buffers._POOL._total == 8 * MEGABYTES  # what is in use is never refused
        del held
        assert buffers._POOL._total == 6 * MEGABYTES
        kept = buffers.empty((6, MEGABYTES), torch.uint8)
        assert buffers._POOL._total == 6 * MEGABYTES
    assert buffers._POOL._total == 6 * MEGABYTES
    kept.fill_(3)
    del kept
    assert buffers._POOL._total == 0


def test_outside_memory_is_torchs_and_small_tensors_are_too() -> None:
    assert buffers.empty((4, MEGABYTES), torch.uint8).shape == (4, MEGABYTES)
    with buffers.reused():
        assert buffers.empty((0, 3), torch.int32).shape == (0, 3)
        assert buffers.empty((5,), torch.int32).dtype == torch.int32
        assert buffers._POOL._total == 0


def test_threads_never_share_memory() -> None:
    found: list[bool] = []

    def work(mark: int) -> None:
        for size in range(1, 40):
            memory = buffers.empty((MEGABYTES + 4096 * (size % 5),), torch.uint8)
            memory.fill_(mark)
            found.append(bool((memory == mark).all()))

    with buffers.reused():
        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * 39
    assert all(found)
    assert buffers._POOL._total == 0
