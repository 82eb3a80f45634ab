"""Work on the next modules while the last one is written, within a bound on what is in memory at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from aphroquant import buffers

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 4
# Weights in work at once; a module that has more is alone. Codes take up to three bytes each while they are compared.
WEIGHTS_AT_ONCE = 2**29


def in_order(
    items: Iterable[tuple[Item, int]], work: Callable[[Item], Result], *, at_once: int = WEIGHTS_AT_ONCE
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of `items`, which come with their sizes, some worked on in threads ahead of it.

    An error comes up where its item would; what was begun after it is finished and dropped.
    """
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    with buffers.reused(), ThreadPoolExecutor(max_workers=min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            for item, size in items:
                while waiting and (len(waiting) > MAX_WORKERS or sum(each[1] for each in waiting) + size > at_once):
                    yield _first(waiting)
                waiting.append((item, size, pool.submit(work, item)))
            while waiting:
                yield _first(waiting)
        finally:
            for _, _, future in waiting:
                future.cancel()


def _first(waiting: deque[tuple[Item, int, Future[Result]]]) -> tuple[Item, Result]:
    item, _, future = waiting[0]
    result = future.result()
    waiting.popleft()
    return item, result
