"""Batch sizes for which a decode step is captured; other batches are padded to the next one."""

from __future__ import annotations

from bisect import bisect_left

MAX_BUCKET = 512
_STEP = 16


def batch_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, then in steps of 16 up to MAX_BUCKET; the last holds `max_num_seqs` if it may."""
    largest = min(max_num_seqs, MAX_BUCKET)
    sizes = [size for size in (1, 2, 4, 8, *range(_STEP, MAX_BUCKET + 1, _STEP)) if size < largest]
    return [*sizes, largest]


def bucket_for(num_sequences: int, buckets: list[int]) -> int | None:
    """The smallest bucket that holds so many; None if none does."""
    index = bisect_left(buckets, num_sequences)
    return buckets[index] if index < len(buckets) else None
