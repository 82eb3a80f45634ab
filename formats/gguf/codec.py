"""Bytes of a tensor <-> its weight, for every type. Codes, scales and minima are taken as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.formats.gguf import float4_blocks, simple_blocks, super_blocks
from aphroquant.formats.gguf.block_types import BlockType
from aphroquant.schemes import DenseScheme, QuantizedWeight

Tensors = Mapping[str, Tensor]


class _Codec(NamedTuple):
    """`read`: blocks uint8 [N, blocks, bytes] -> canonical tensors [N, blocks, ...]; `write` is its inverse."""

    read: Callable[[Tensor], dict[str, Tensor]]
    write: Callable[[Tensors], Tensor]


_CODECS: Mapping[str, _Codec] = {
    "Q4_0": _Codec(simple_blocks.read_q4_0, simple_blocks.write_q4_0),
    "Q4_1": _Codec(simple_blocks.read_q4_1, simple_blocks.write_q4_1),
    "Q5_0": _Codec(simple_blocks.read_q5_0, simple_blocks.write_q5_0),
    "Q5_1": _Codec(simple_blocks.read_q5_1, simple_blocks.write_q5_1),
    "Q8_0": _Codec(simple_blocks.read_q8_0, simple_blocks.write_q8_0),
    "Q2_K": _Codec(super_blocks.read_q2_k, super_blocks.write_q2_k),
    "Q3_K": _Codec(super_blocks.read_q3_k, super_blocks.write_q3_k),
    "Q4_K": _Codec(super_blocks.read_q4_k, super_blocks.write_q4_k),
    "Q5_K": _Codec(super_blocks.read_q5_k, super_blocks.write_q5_k),
    "Q6_K": _Codec(super_blocks.read_q6_k, super_blocks.write_q6_k),
    "IQ4_NL": _Codec(float4_blocks.read_iq4_nl, float4_blocks.write_iq4_nl),
    "MXFP4": _Codec(float4_blocks.read_mxfp4, float4_blocks.write_mxfp4),
    "NVFP4": _Codec(float4_blocks.read_nvfp4, float4_blocks.write_nvfp4),
}


def decode(block_type: BlockType, data: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    """Bytes uint8 [N * bytes of a row] as a weight of `shape` (N, K), K a multiple of the block size.

    NVFP4's global scale is one: files hold it, if at all, as a tensor of its own.
    """
    rows, columns = shape
    if isinstance(block_type.scheme, DenseScheme):
        return QuantizedWeight(block_type.scheme, {"weight": data.view(block_type.scheme.dtype).view(shape)}, shape)
    blocks = data.view(rows, columns // block_type.block_size, block_type.block_bytes)  # [N, blocks, bytes]
    tensors = {name: t.reshape(rows, -1) for name, t in _CODECS[block_type.name].read(blocks).items()}
    if block_type.name == "NVFP4":
        tensors["global_scale"] = torch.tensor(1.0, dtype=torch.float64)
    return QuantizedWeight(block_type.scheme, tensors, shape)


def encode(block_type: BlockType, weight: QuantizedWeight) -> Tensor:
    """uint8 [N, bytes of a row]: the inverse of `decode`, for a weight in the type's own scheme (see `held_by`).

    NVFP4's global scale is left out: it is the caller's to store.
    """
    assert weight.scheme == block_type.scheme, f"{weight.scheme} is not {block_type.name}'s"
    rows, columns = weight.shape
    if isinstance(block_type.scheme, DenseScheme):
        return weight["weight"].contiguous().view(torch.uint8).view(rows, -1)
    num_blocks = columns // block_type.block_size
    per_block = {name: t.reshape(rows, num_blocks, -1) for name, t in weight.tensors.items() if t.ndim}
    return _CODECS[block_type.name].write(per_block).view(rows, -1)
