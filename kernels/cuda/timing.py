"""How long kernels take, as they run in an engine: from device memory, not from the cache, and without launch gaps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from aphroquant.kernels.cuda.device import gpu

ROTATION = 3  # copies of the weights together exceed the L2 cache this many times
_CALLS, _MICROSECONDS = 32, 1500  # in a graph: about so many calls, as long as they take no more time


def num_copies(num_bytes: int, limit: int = 64) -> int:
    """How many copies of a weight of that size a timing rotates over."""
    l2 = gpu(torch.cuda.current_device()).l2_bytes
    return max(2, min(limit, -(-ROTATION * l2 // max(1, num_bytes))))


def time_rotated(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Median microseconds of one call.

    One CUDA graph holds all calls, each on its own copy of the weights (together more than 3x L2), and is replayed.
    Short calls are in it several times over: starting a graph takes some 10 us, which would else be shared by a few.
    """
    once = statistics.median(time_replays(calls, 3)) * len(calls)
    rounds = min(_CALLS / len(calls), _MICROSECONDS / once)
    return statistics.median(time_replays(list(calls) * max(1, round(rounds)), replays))


def time_replays(calls: Sequence[Callable[[], object]], replays: int = 15) -> list[float]:
    """Microseconds of one call, for each replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times


def read_bandwidth(num_bytes: int = 4 << 30) -> float:
    """Bytes a second that a plain read of device memory reaches: the ceiling for kernels that stream weights."""
    memory = torch.ones(num_bytes // 4, device="cuda")
    return num_bytes / (min(time_replays([lambda: torch.sum(memory)], 8)) * 1e-6)
