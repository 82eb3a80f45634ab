"""Timing layers of several experts on a GPU, beside one expert after another and other libraries' grouped products."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.errors import AphroquantError
from aphroquant.kernels.benchmark.expert_peers import ExpertPeer, find_expert_peers
from aphroquant.kernels.benchmark.expert_routing import draw_experts, num_active
from aphroquant.kernels.benchmark.expert_shapes import ExpertShape
from aphroquant.kernels.benchmark.measure import (
    Ceilings,
    Measurement,
    experts_error,
    floor_microseconds,
    product_dtype,
    weight_bytes,
)
from aphroquant.kernels.cuda.backend import grouped_fallback_reason, prepare, prepare_grouped
from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups, group_tokens
from aphroquant.kernels.cuda.timing import ROTATION, time_rotated
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme

Bind = Callable[[Any, Tensor, CudaTokenGroups], Callable[[], Tensor]]  # (what was prepared, x, groups) -> one call
_MAX_CALLS = 24


@dataclass(frozen=True)
class _Kernel:
    """What is timed: `prepared` layers, and how they become a call."""

    name: str
    prepared: Any
    bind: Bind
    weights: Sequence[QuantizedWeight]
    exact: bool = True


def measure_experts(
    shape: ExpertShape, scheme: Scheme, rows: Sequence[int], dtype: torch.dtype, ceilings: Ceilings, peers: Path | None
) -> Iterator[Measurement | str]:
    """Our grouped kernels, our dense ones expert by expert, then others, at each number of tokens.

    Sorting the tokens is left out; gathering and quantizing them is not. The bytes are those of experts with tokens.
    """
    torch.manual_seed(0)
    weights = [_weight(shape, scheme, dtype) for _ in range(shape.experts)]
    one_call = _one_call(shape)
    if reason := grouped_fallback_reason(weights, dtype):
        yield f"aphroquant {shape.name}: {reason}"
    else:
        layer = prepare_grouped(weights, None, dtype)
        yield from _measure(_Kernel("aphroquant", layer, one_call, weights), shape, rows, dtype, ceilings)
        del layer
    loop = [prepare(weight, None, dtype) for weight in weights]
    kernel = _Kernel("aphroquant, expert by expert", loop, _expert_by_expert(shape), weights)
    yield from _measure(kernel, shape, rows, dtype, ceilings)
    del loop, kernel
    for peer in find_expert_peers(scheme, dtype, peers):
        yield from _measure_peer(peer, shape, weights, rows, dtype, ceilings)


def _weight(shape: ExpertShape, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    weight = random_weight(scheme, shape.out_features, shape.in_features, "cuda")
    if not isinstance(scheme, IntegerScheme):
        return weight
    scales = {name: weight[name].to(dtype) for name in ("scales", "offsets") if name in weight.tensors}
    return QuantizedWeight(scheme, {**weight.tensors, **scales}, weight.shape)


def _one_call(shape: ExpertShape) -> Bind:
    """With a list of tiles that is new to the product of tokens, as behind a router, and known to the next."""

    def bind(layer: Callable[..., Tensor], x: Tensor, groups: CudaTokenGroups) -> Callable[[], Tensor]:
        def run() -> Tensor:
            groups.progress.multiplied = not shape.by_token
            return layer(x, groups, in_order=not shape.by_token)

        return run

    return bind


def _expert_by_expert(shape: ExpertShape) -> Bind:
    """With numbers of tokens that are known beforehand, as an engine does not have them."""

    def bind(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, groups: CudaTokenGroups) -> Callable[[], Tensor]:
        ends, rows = groups.offsets.tolist(), groups.rows.long()
        out = x.new_empty(groups.num_pairs, shape.out_features)

        def run() -> Tensor:
            for expert, layer in enumerate(layers):
                start, end = ends[expert], ends[expert + 1]
                if end > start:
                    out[start:end] = layer(x[rows[start:end]] if shape.by_token else x[start:end])
            return out

        return run

    return bind


def _measure_peer(
    peer: ExpertPeer,
    shape: ExpertShape,
    weights: Sequence[QuantizedWeight],
    rows: Sequence[int],
    dtype: torch.dtype,
    ceilings: Ceilings,
) -> Iterator[Measurement | str]:
    try:
        of = [peer.weight_of(weight, dtype) for weight in weights]
        kernel = _Kernel(peer.name, peer.make(of, shape), _one_call(shape), of, peer.exact)
    except (AphroquantError, RuntimeError, ValueError) as failure:
        yield f"{peer.name} {shape.name}: {_first_line(failure)}"
        return
    yield from _measure(kernel, shape, rows, dtype, ceilings)


def _measure(
    kernel: _Kernel, shape: ExpertShape, rows: Sequence[int], dtype: torch.dtype, ceilings: Ceilings
) -> Iterator[Measurement | str]:
    one = weight_bytes(kernel.weights[0])
    rotated = ROTATION * gpu(torch.cuda.current_device()).l2_bytes
    copies = [kernel.prepared]
    copies += [copy.deepcopy(kernel.prepared) for _ in range(-(-rotated // (one * shape.experts)) - 1)]
    for tokens in rows:
        pairs = tokens * shape.top_k
        used = min(pairs, shape.experts) * one
        drawn = draw_experts(shape, tokens, min(_MAX_CALLS, max(2, len(copies), -(-rotated // used))))
        active = sum(num_active(ids) for ids in drawn) / len(drawn)
        x = torch.randn(tokens if shape.by_token else pairs, shape.in_features, device="cuda").to(dtype)
        groups = [group_tokens(ids.cuda(), shape.experts) for ids in drawn]
        moved = int(active * one) + (x.numel() + pairs * shape.out_features) * dtype.itemsize
        operations = 2 * pairs * shape.out_features * shape.in_features
        floor = floor_microseconds(moved, operations, product_dtype(kernel.weights[0], dtype), ceilings)
        try:
            calls = [kernel.bind(copies[i % len(copies)], x, part) for i, part in enumerate(groups)]
            error = experts_error(calls[0](), kernel.weights, x, groups[0], shape.by_token) if kernel.exact else None
            microseconds = time_rotated(calls)
        except (AphroquantError, RuntimeError, ValueError) as failure:
            yield f"{kernel.name} {shape.name} M={tokens}: {_first_line(failure)}"
            continue
        size = (shape.out_features, shape.in_features)
        yield Measurement(kernel.name, shape.name, *size, tokens, microseconds, moved, floor, error, pairs)
    del copies
    gc.collect()
    torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
