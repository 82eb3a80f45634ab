"""Records come back as they were, and damaged ones are found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aphroquant.conversion.job.record import find_records, is_whole, read_record, remove_partial, write_record

TENSORS = {
    "codes": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "scales": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
    "nothing": torch.empty(0, 5),
    "eights": torch.ones(3, dtype=torch.float8_e4m3fn),
    "columns": torch.arange(6.0).view(2, 3).T,
}
FACTS = {"loss": 0.1 + 0.2, "endless": float("inf"), "words": ["ä", None, True]}


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*bits)


def test_a_record_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = write_record(tmp_path, "block", 7, TENSORS, FACTS)
    assert find_records(tmp_path) == [written]
    assert is_whole(written)
    tensors, facts = read_record(written)
    assert facts == FACTS
    assert set(tensors) == set(TENSORS)
    assert all(same_bits(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_record_is_a_safetensors_file(tmp_path: Path) -> None:
    loaded = load_file(write_record(tmp_path, "block", 0, TENSORS, {}).path)
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_tensors_are_filled_in_place_where_that_is_wanted(tmp_path: Path) -> None:
    rows = torch.randn(2**21 + 3, 3)  # several steps
    written = write_record(tmp_path, "states", 1, {"hidden": rows, "other": rows[:1]}, {})
    place = torch.zeros_like(rows)
    tensors, _ = read_record(written, {"hidden": place})
    assert torch.equal(place, rows)
    assert set(tensors) == {"other"}


@pytest.mark.parametrize("damage", ["cut", "changed", "longer", "gone"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    written = write_record(tmp_path, "states", 1, TENSORS, FACTS)
    content = bytearray(written.path.read_bytes())
    if damage == "gone":
        written.path.unlink()
    elif damage == "changed":
        content[-5] ^= 16
        written.path.write_bytes(content)
    else:
        written.path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    assert not is_whole(written)


def test_what_was_being_written_is_no_record(tmp_path: Path) -> None:
    (tmp_path / ".states-000003.partial").write_bytes(b"half")
    assert find_records(tmp_path) == []
    remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path, "block", 0, TENSORS, {})
    assert not list(tmp_path.iterdir())
