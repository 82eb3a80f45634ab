"""Work on the next modules while the last one is written, within a bound on what is in memory at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

import torch

from aphroquant import buffers
from aphroquant.prefetch import prefetched

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 4
# Weights in work at once; a module that has more is alone. Codes take up to three bytes each while they are compared.
WEIGHTS_AT_ONCE = 3 * 2**27


def in_order(
    items: Iterable[tuple[Item, int]],
    work: Callable[[Item], Result],
    *,
    at_once: int = WEIGHTS_AT_ONCE,
    max_workers: int = MAX_WORKERS,
) -> Generator[tuple[Item, Result], None, None]:
    """(item, work(item)) in the order of `items`, which come with their sizes, some worked on in threads ahead of it.

    `items` are made in a thread too, one or two before they are needed. While the caller has a result, more is in work.
    An error comes up where its item would; what was begun after it is finished and dropped.
    """
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    num_workers = min(max_workers, torch.get_num_threads())
    with (
        buffers.reused(),
        _sharing_threads(num_workers),
        closing(prefetched(items)) as coming,
        ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="working") as pool,
    ):
        try:
            for item, size in coming:
                done = None
                while waiting and (len(waiting) > max_workers or sum(each[1] for each in waiting) + size > at_once):
                    if done is not None:
                        yield done
                    done = _first(waiting)
                waiting.append((item, size, pool.submit(work, item)))
                del item
                if done is not None:
                    yield done
                    del done
            while waiting:
                yield _first(waiting)
        finally:
            for _, _, future in waiting:
                future.cancel()


@contextmanager
def _sharing_threads(num_workers: int) -> Iterator[None]:
    """torch's operations get a share of the processor each: more threads than cores wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // num_workers))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _first(waiting: deque[tuple[Item, int, Future[Result]]]) -> tuple[Item, Result]:
    item, _, future = waiting[0]
    result = future.result()
    waiting.popleft()
    return item, result
