"""GGUF block types: the bytes of rows of blocks -> canonical weights.

A row of K elements is a row of blocks of `block_size` elements and `block_bytes` bytes, each with its own fp16 scale
(and minimum). Everything is bit-exact: codes and fp16 scales are taken as they stand.

    Q4_0  18 B   d, 16 B     x = d (q - 8)       byte i of a block: element i in the low nibble, i + 16 in the high
    Q4_1  20 B   d, m, 16 B  x = d q + m
    Q8_0  34 B   d, 32 int8  x = d q             canonical code: q + 128
    Q4_K  144 B  d, dmin, 12 B of eight 6-bit scales and minima, 128 B   x = d sc q - dmin m
    Q6_K  210 B  128 B low nibbles, 64 B high 2-bit parts, 16 int8 scales, d   x = d sc (q - 32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.schemes import DenseScheme, IntegerScheme, KQuantScheme, QuantizedWeight, Scheme

BLOCK = 32
SUPER_BLOCK = 256


class BlockType(NamedTuple):
    """One ggml tensor type: its name, and `block_bytes` for every `block_size` elements of a row."""

    name: str
    block_size: int
    block_bytes: int
    scheme: Scheme


BLOCK_TYPES = {  # by the type id in the file
    0: BlockType("F32", 1, 4, DenseScheme(torch.float32)),
    1: BlockType("F16", 1, 2, DenseScheme(torch.float16)),
    2: BlockType("Q4_0", BLOCK, 18, IntegerScheme(4, BLOCK, symmetric=True)),
    3: BlockType("Q4_1", BLOCK, 20, IntegerScheme(4, BLOCK, symmetric=False, has_offsets=True)),
    8: BlockType("Q8_0", BLOCK, 34, IntegerScheme(8, BLOCK, symmetric=True)),
    12: BlockType("Q4_K", SUPER_BLOCK, 144, KQuantScheme("q4_k")),
    14: BlockType("Q6_K", SUPER_BLOCK, 210, KQuantScheme("q6_k")),
    30: BlockType("BF16", 1, 2, DenseScheme(torch.bfloat16)),
}
# Named in messages about files that hold them.
UNREADABLE_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def decode(block_type: BlockType, data: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    """Bytes uint8 [N * bytes of a row] as a weight of `shape` (N, K), K a multiple of the block size."""
    rows, columns = shape
    if isinstance(block_type.scheme, DenseScheme):
        return QuantizedWeight(block_type.scheme, {"weight": data.view(block_type.scheme.dtype).view(shape)}, shape)
    blocks = data.view(rows, columns // block_type.block_size, block_type.block_bytes)  # [N, blocks, bytes]
    tensors = _DECODERS[block_type.name](blocks)
    return QuantizedWeight(block_type.scheme, {name: t.reshape(rows, -1) for name, t in tensors.items()}, shape)


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[..., 2:]), "scales": _half(blocks[..., :2])}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "codes": _nibbles(blocks[..., 4:]),
        "scales": _half(blocks[..., :2]),
        "offsets": _half(blocks[..., 2:4]),
    }


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    codes = blocks[..., 2:] ^ 0x80  # int8 + 128: flips the sign bit
    return {"codes": codes, "scales": _half(blocks[..., :2])}


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    packed = blocks[..., 4:16]  # the 6-bit scales and minima of eight sub-blocks
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)
    mins = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), dim=-1)
    pairs = blocks[..., 16:].reshape(
        *blocks.shape[:2], 4, 32
    )  # each 32 bytes: a sub-block of low nibbles, then one of high ones
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-2)  # [N, blocks, 4, 2, 32]
    return {
        "codes": codes,
        "d": _half(blocks[..., :2]),
        "dmin": _half(blocks[..., 2:4]),
        "sub_scales": scales,
        "sub_mins": mins,
    }


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)  # [N, blocks, half, 32-byte run, 32]
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    nibbles = torch.cat((low & 15, low >> 4), dim=-2)  # [..., half, 4, 32]: the order of the elements
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    codes = nibbles | (((high >> shifts) & 3) << 4)
    return {
        "codes": codes,
        "d": _half(blocks[..., 208:]),
        "sub_scales": blocks[..., 192:208].contiguous().view(torch.int8),
    }


_DECODERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _half(pair: Tensor) -> Tensor:
    return pair.contiguous().view(torch.float16)
