"""Timing layers on the CPU: calls that rotate over copies of the weight larger than the last-level cache."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.errors import AphroquantError
from aphroquant.kernels.benchmark.expert_routing import draw_experts, num_active
from aphroquant.kernels.benchmark.expert_shapes import ExpertShape
from aphroquant.kernels.benchmark.layer_shapes import LayerShape
from aphroquant.kernels.benchmark.measure import (
    Ceilings,
    Measurement,
    error_of,
    experts_error,
    floor_microseconds,
    weight_bytes,
)
from aphroquant.kernels.dispatch import Backend
from aphroquant.kernels.grouped import group_tokens
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.matmul import linear
from aphroquant.schemes import QuantizedWeight, Scheme

_ROTATION, _MIN_COPIES, _MAX_COPIES = 3, 2, 64
_SECONDS = 0.6  # of calls for each time
_WORDS = re.compile(r"(\d+)([KMG]?)")


def cpu_ceilings() -> Ceilings:
    """Measured with a plain sum over 512 MiB and a float32 matrix product, with torch's threads."""
    memory = torch.ones(128 << 20)
    read = memory.numel() * 4 / (min(_times([lambda: torch.sum(memory)], 8)) * 1e-6)
    x, y = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = 2 * 1024**3 / (min(_times([lambda: linear(x, y)], 8)) * 1e-6)
    return Ceilings(read, {"float32": product})


def measure_cpu(
    shape: LayerShape, scheme: Scheme, rows: Sequence[int], backend: Backend, ceilings: Ceilings
) -> Iterator[Measurement | str]:
    """The backend's kernel, then torch's float32 product, at each number of rows.

    The floor counts the bytes only: 8-bit products are faster than the float32 ones that the ceiling was measured with.
    """
    torch.manual_seed(0)
    weight = random_weight(scheme, shape.out_features, shape.in_features)
    try:
        runs: list[Callable[[Tensor], Tensor]] = [
            backend.prepare(weight, None) for _ in range(_num_copies(weight_bytes(weight)))
        ]
    except AphroquantError as error:
        yield f"aphroquant {shape.name}: {error.message}"
        return
    yield from _measure("aphroquant", shape, weight, runs, rows, ceilings)
    dense = QuantizedWeight.dense(weight.dequantize())
    copies = [dense["weight"].clone() for _ in range(_num_copies(weight_bytes(dense)))]
    torch_runs = [partial(_torch_float32, matrix) for matrix in copies]
    yield from _measure("torch float32", shape, dense, torch_runs, rows, ceilings)


def measure_experts_cpu(
    shape: ExpertShape, scheme: Scheme, rows: Sequence[int], backend: Backend, ceilings: Ceilings
) -> Iterator[Measurement | str]:
    """The backend's layers, one expert after another, at each number of tokens."""
    torch.manual_seed(0)
    weights = [random_weight(scheme, shape.out_features, shape.in_features) for _ in range(shape.experts)]
    try:
        layer = backend.prepare_grouped(weights, None)
    except AphroquantError as error:
        yield f"aphroquant {shape.name}: {error.message}"
        return
    one = weight_bytes(weights[0])
    for tokens in rows:
        pairs = tokens * shape.top_k
        count = _num_copies(one * min(pairs, shape.experts))
        drawn = draw_experts(shape, tokens, count)
        active = sum(num_active(ids) for ids in drawn) / count
        x = torch.randn(tokens if shape.by_token else pairs, shape.in_features)
        groups = [group_tokens(ids, shape.experts) for ids in drawn]
        calls = [partial(layer, x, part, in_order=not shape.by_token) for part in groups]
        moved = int(active * one) + 4 * (x.numel() + pairs * shape.out_features)
        wrong = experts_error(calls[0](), weights, x, groups[0], shape.by_token)
        microseconds = statistics.median(_times(calls, 5))
        size = (shape.out_features, shape.in_features)
        floor = floor_microseconds(moved, 0, "float32", ceilings)
        yield Measurement("aphroquant", shape.name, *size, tokens, microseconds, moved, floor, wrong, pairs)


def _torch_float32(matrix: Tensor, x: Tensor) -> Tensor:
    return linear(x, matrix)


def _measure(
    kernel: str,
    shape: LayerShape,
    weight: QuantizedWeight,
    runs: Sequence[Callable[[Tensor], Tensor]],
    rows: Sequence[int],
    ceilings: Ceilings,
) -> Iterator[Measurement]:
    for count in rows:
        x = torch.randn(count, shape.in_features)
        moved = weight_bytes(weight) + 4 * (x.numel() + count * shape.out_features)
        operations = 0 if kernel == "aphroquant" else 2 * count * shape.out_features * shape.in_features
        floor = floor_microseconds(moved, operations, "float32", ceilings)
        error = error_of(runs[0], weight, x)
        microseconds = statistics.median(_times([partial(run, x) for run in runs], 5))
        yield Measurement(kernel, *shape, count, microseconds, moved, floor, error)


def _times(calls: Sequence[Callable[[], object]], min_rounds: int) -> list[float]:
    """Microseconds of one call, for each round over all of them."""
    for call in calls:
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < min_rounds or (len(times) < 100 and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) * 1e6 / len(calls))
    return times


def _num_copies(num_bytes: int) -> int:
    return max(_MIN_COPIES, min(_MAX_COPIES, -(-_ROTATION * last_level_cache() // max(1, num_bytes))))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where Linux does not tell."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := _WORDS.fullmatch(path.read_text().strip()):
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes[1:], default=sizes[0])
