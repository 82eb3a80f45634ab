"""Activations in memory and in a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from aphroquant.conversion.activations import CHUNK_TOKENS, Activations, chunks, default_memory_limit


def test_past_the_limit_rows_live_in_a_file_that_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Activations(100, 8, memory_limit=1000)
    assert store.spilled
    assert list(tmp_path.iterdir()) == []
    values = torch.randn(100, 8)
    store.rows[10:60] = values[10:60]
    assert torch.equal(store.rows[10:60], values[10:60])
    store.rows[10:20] += 1
    assert torch.equal(store.rows[10:20], values[10:20] + 1)


def test_under_the_limit_rows_stay_in_memory() -> None:
    assert not Activations(100, 8, memory_limit=3200).spilled


@pytest.mark.parametrize(("num_tokens", "window_len"), [(512 * 20, 512), (100_000, 100), (10_000, 5_000), (0, 7)])
def test_chunks_are_whole_windows_and_cover_everything(num_tokens: int, window_len: int) -> None:
    covered = 0
    for part in chunks(num_tokens, window_len):
        assert part.start == covered
        assert (part.stop - part.start) % window_len == 0
        assert part.stop - part.start <= max(CHUNK_TOKENS, window_len)
        covered = part.stop
    assert covered == num_tokens


def test_the_default_limit_is_a_share_of_the_machines_memory() -> None:
    assert 2**28 < default_memory_limit() < 2**44
