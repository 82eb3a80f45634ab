"""Dense weights -> the numbers of a GGUF type, by search on the CPU: blocks are independent, so it goes row by row.

Root mean square errors on normally distributed weights, beside rounding to extremes and to llama.cpp's own encoders,
stand in tests/formats/test_gguf_quantize.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.gguf import float4_encoders, simple_encoders, super_encoders
from aphroquant.formats.gguf.block_types import BlockType
from aphroquant.schemes import DenseScheme, KQuantScheme, QuantizedWeight

_CHUNK = 2**18  # elements at a time: their intermediate results fit the caches
_LEAST_SHARE = 1e-6  # of the mean importance, for columns that are never used: they still need some value

Encoder = Callable[[Tensor, Tensor], dict[str, Tensor]]

_ENCODERS: Mapping[str, Encoder] = {
    "Q4_0": partial(simple_encoders.symmetric_block, bits=4),
    "Q4_1": partial(simple_encoders.affine_block, bits=4),
    "Q5_0": partial(simple_encoders.symmetric_block, bits=5),
    "Q5_1": partial(simple_encoders.affine_block, bits=5),
    "Q8_0": simple_encoders.wide_block,
    "Q2_K": partial(super_encoders.encode_affine, scheme=KQuantScheme("q2_k")),
    "Q3_K": partial(super_encoders.encode_symmetric, scheme=KQuantScheme("q3_k")),
    "Q4_K": partial(super_encoders.encode_affine, scheme=KQuantScheme("q4_k")),
    "Q5_K": partial(super_encoders.encode_affine, scheme=KQuantScheme("q5_k")),
    "Q6_K": partial(super_encoders.encode_symmetric, scheme=KQuantScheme("q6_k")),
    "IQ4_NL": float4_encoders.iq4_nl_block,
    "MXFP4": float4_encoders.mxfp4_block,
}
ENCODABLE = ("F32", "F16", "BF16", *_ENCODERS)


def quantize(
    block_type: BlockType, weight: Tensor, importance: Tensor | None = None, *, name: str = "the weight"
) -> QuantizedWeight:
    """`weight` [N, K] in the type's scheme, of the least squared error that the search finds.

    `importance` [K] weighs the errors of each input column: E[x**2] of the layer's inputs makes it the error of the
    layer's output. `name` is the tensor, for messages.
    """
    rows, columns = weight.shape
    check_encodable(block_type, columns, name)
    if isinstance(block_type.scheme, DenseScheme):
        return QuantizedWeight.dense(_cast(weight, block_type.scheme.dtype, name))
    if not weight.isfinite().all():
        raise InputError(f"{name} holds values that are not finite, and cannot be quantized")
    factors = _factors(importance, columns, name)
    step = max(1, _CHUNK // columns)
    chunks = [_encode_rows(block_type, weight[begin : begin + step], factors) for begin in range(0, rows, step)]
    tensors = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    if any(t.dtype == torch.float16 and not t.isfinite().all() for t in tensors.values()):
        largest = float(weight.abs().max())
        raise UsageError(f"{name}: values up to {largest:g} are too large for {block_type.name}'s float16 scales")
    return QuantizedWeight(block_type.scheme, tensors, (rows, columns))


def check_encodable(block_type: BlockType, columns: int, name: str) -> None:
    """UsageError unless there is an encoder for the type, and rows of that length are whole blocks."""
    if block_type.name not in ENCODABLE:
        raise UsageError(f"{name}: there is no encoder for {block_type.name}; there are {', '.join(ENCODABLE)}")
    if columns % block_type.block_size:
        raise UsageError(
            f"{name}: {block_type.name} needs rows that are a multiple of {block_type.block_size}, not {columns}"
        )


def _encode_rows(block_type: BlockType, rows: Tensor, factors: Tensor) -> dict[str, Tensor]:
    size = block_type.block_size
    x = rows.float().reshape(-1, size)
    weights = factors.expand(rows.shape[0], -1).reshape(-1, size)
    encoded = _ENCODERS[block_type.name](x, weights)
    return {key: tensor.reshape(rows.shape[0], -1) for key, tensor in encoded.items()}


def _factors(importance: Tensor | None, columns: int, name: str) -> Tensor:
    """Positive factors [K] of mean one."""
    if importance is None:
        return torch.ones(columns)
    if importance.shape != (columns,):
        raise UsageError(f"{name}: the importance has shape {list(importance.shape)}, but must be [{columns}]")
    factors = importance.double()
    mean = factors.mean()
    if not (factors >= 0).all() or not mean.isfinite():
        raise UsageError(f"{name}: the importance of a column must be finite and not negative")
    return torch.ones(columns) if mean == 0 else (factors / mean + _LEAST_SHARE).float()


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype)
    if not cast.isfinite().equal(weight.isfinite()):
        raise UsageError(
            f"{name}: values up to {float(weight[weight.isfinite()].abs().max()):g} do not fit {dtype}",
            hint="write it as BF16 or F32",
        )
    return cast
