"""Items of an iterator, made in a thread ahead of whoever takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")


class _End:
    """Stands behind the last item."""


_END: Final = _End()


def prefetched(items: Iterable[Item], ahead: int = 1) -> Generator[Item, None, None]:
    """The items in their order, up to `ahead` of them made before they are asked for.

    One thread makes them all, one after another. An error comes up where its item would. Whoever leaves early closes
    this, and nothing more is made: each item is a task of its own, so that no thread waits for anybody.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
        coming: deque[Future[Item | _End]] = deque(pool.submit(next, source, _END) for _ in range(ahead))
        try:
            while not isinstance(item := coming.popleft().result(), _End):
                coming.append(pool.submit(next, source, _END))
                taken = [item]
                del item  # so that its memory can be used again as soon as the caller is done
                yield taken.pop()
        finally:
            for each in coming:
                each.cancel()
