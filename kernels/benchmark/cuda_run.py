"""Timing layers on a GPU: replays of a CUDA graph that rotates over copies of the weight larger than the cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.errors import AphroquantError
from aphroquant.kernels.benchmark.layer_shapes import LayerShape
from aphroquant.kernels.benchmark.measure import (
    Ceilings,
    Measurement,
    error_of,
    floor_microseconds,
    product_dtype,
    weight_bytes,
)
from aphroquant.kernels.benchmark.peers import Peer, QuantizedInputs, find_peers
from aphroquant.kernels.cuda.backend import fallback_reason, prepare
from aphroquant.kernels.cuda.float8.linear import CudaFloat8Linear
from aphroquant.kernels.cuda.timing import num_copies, read_bandwidth, time_replays, time_rotated
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import FloatScheme, IntegerScheme, QuantizedWeight, Scheme

Run = Callable[[Tensor], Tensor]


def cuda_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measured with a plain sum and a large matrix product."""
    name = str(dtype).removeprefix("torch.")
    rates = {name: _product_rate(lambda x, y: x @ y.T, dtype)}
    if torch.cuda.get_device_capability() >= (8, 9):
        rates["float8"] = _product_rate(_float8_product, torch.float8_e4m3fn)
    rates["int8"] = rates.get("float8", 2 * rates[name])  # the same units, where there are any
    return Ceilings(read_bandwidth(), rates)


def measure_cuda(
    shape: LayerShape, scheme: Scheme, rows: Sequence[int], dtype: torch.dtype, ceilings: Ceilings, peers: Path | None
) -> Iterator[Measurement | str]:
    """Our kernel, then the others, at each number of rows. A kernel that fails gives a sentence in place of times."""
    torch.manual_seed(0)
    weight = random_weight(scheme, shape.out_features, shape.in_features, "cuda")
    if isinstance(scheme, IntegerScheme):  # scales in the inputs' dtype, which every kernel takes as it is
        scales = {name: weight[name].to(dtype) for name in ("scales", "offsets") if name in weight.tensors}
        weight = QuantizedWeight(scheme, {**weight.tensors, **scales}, weight.shape)
    name = "aphroquant" if fallback_reason(scheme, dtype) is None else "aphroquant (dequantize and multiply)"
    yield from _measure(shape, Peer(name, partial(_own, dtype=dtype)), weight, rows, dtype, ceilings)
    if isinstance(scheme, FloatScheme) and fallback_reason(scheme, dtype) is None:
        given = Peer("aphroquant (inputs quantized before)", partial(_own_given_codes, dtype=dtype))
        if CudaFloat8Linear(weight, None).takes_codes:
            yield from _measure(shape, given, weight, rows, dtype, ceilings)
    for peer in find_peers(scheme, dtype, peers):
        yield from _measure(shape, peer, weight, rows, dtype, ceilings)


def _own(weight: QuantizedWeight, dtype: torch.dtype) -> Run:
    return prepare(weight, None, dtype)


def _own_given_codes(weight: QuantizedWeight, dtype: torch.dtype) -> Run:
    """What the layer does with inputs that a fused kernel in front of it quantized."""
    layer, quantized = CudaFloat8Linear(weight, None), QuantizedInputs()

    def run(x: Tensor) -> Tensor:
        codes, scales = quantized(x)
        return layer.multiply_codes(codes, scales.reshape(-1), dtype)

    return run


def _measure(
    shape: LayerShape,
    peer: Peer,
    weight: QuantizedWeight,
    rows: Sequence[int],
    dtype: torch.dtype,
    ceilings: Ceilings,
) -> Iterator[Measurement | str]:
    try:
        of = peer.weight_of(weight, dtype)
        size = weight_bytes(of)
        runs = [peer.make(of) for _ in range(num_copies(size))]
    except (AphroquantError, RuntimeError, ValueError) as failure:
        yield f"{peer.name} {shape.name}: {_first_line(failure)}"
        return
    for count in rows:
        x = torch.randn(count, shape.in_features, device="cuda").to(dtype)
        operations = 2 * count * shape.out_features * shape.in_features
        moved = size + (x.numel() + count * shape.out_features) * dtype.itemsize
        floor = floor_microseconds(moved, operations, product_dtype(of, dtype), ceilings)
        try:
            error = error_of(runs[0], of, x) if peer.exact else None
            microseconds = time_rotated([partial(run, x) for run in runs])
        except (AphroquantError, RuntimeError, ValueError) as failure:
            yield f"{peer.name} {shape.name} M={count}: {_first_line(failure)}"
            continue
        yield Measurement(peer.name, *shape, count, microseconds, moved, floor, error)
    del runs
    gc.collect()
    torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _product_rate(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, size: int = 8192) -> float:
    x, y = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / (min(time_replays([lambda: product(x, y)], 8)) * 1e-6)


def _float8_product(x: Tensor, y: Tensor) -> Tensor:
    one = torch.ones((), device="cuda")
    return torch._scaled_mm(x, y.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
