"""Items made ahead in a thread: their order, their errors, and an end that leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from aphroquant.prefetch import prefetched


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_items_come_in_their_order(count: int, ahead: int) -> None:
    assert list(prefetched(iter(range(count)), ahead)) == list(range(count))


def test_no_more_is_made_than_was_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    for taken in prefetched(items(), ahead=2):
        assert len(made) <= taken + 3


def test_an_error_comes_up_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("two")

    coming = prefetched(items(), ahead=3)
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(coming)


def test_leaving_early_closes_the_source_and_leaves_no_thread() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    before = threading.active_count()
    coming = prefetched(items())
    assert next(coming) == 0
    assert threading.active_count() == before + 1
    coming.close()
    assert (threading.active_count(), closed) == (before, [True])
