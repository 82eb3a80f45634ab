"""Blocks of 32 integers with one float16 scale, and a float16 minimum in Q4_1 and Q5_1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
_GATHER = sum(2 ** (56 - 7 * byte) for byte in range(8))


def read_q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": unpack_nibbles(blocks[..., 2:]), "scales": as_half(blocks[..., :2])}


def write_q4_0(tensors: Tensors) -> Tensor:
    return torch.cat((half_bytes(tensors["scales"]), pack_nibbles(tensors["codes"])), dim=-1)


def read_q4_1(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "codes": unpack_nibbles(blocks[..., 4:]),
        "scales": as_half(blocks[..., :2]),
        "offsets": as_half(blocks[..., 2:4]),
    }


def write_q4_1(tensors: Tensors) -> Tensor:
    head = half_bytes(tensors["scales"]), half_bytes(tensors["offsets"])
    return torch.cat((*head, pack_nibbles(tensors["codes"])), dim=-1)


def read_q5_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _unpack_fives(blocks[..., 2:]), "scales": as_half(blocks[..., :2])}


def write_q5_0(tensors: Tensors) -> Tensor:
    return torch.cat((half_bytes(tensors["scales"]), _pack_fives(tensors["codes"])), dim=-1)


def read_q5_1(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "codes": _unpack_fives(blocks[..., 4:]),
        "scales": as_half(blocks[..., :2]),
        "offsets": as_half(blocks[..., 2:4]),
    }


def write_q5_1(tensors: Tensors) -> Tensor:
    head = half_bytes(tensors["scales"]), half_bytes(tensors["offsets"])
    return torch.cat((*head, _pack_fives(tensors["codes"])), dim=-1)


def read_q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": blocks[..., 2:] ^ 0x80, "scales": as_half(blocks[..., :2])}  # int8 + 128 flips the sign bit


def write_q8_0(tensors: Tensors) -> Tensor:
    return torch.cat((half_bytes(tensors["scales"]), tensors["codes"] ^ 0x80), dim=-1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., n/2] -> [..., n]: low nibbles are the first half, high ones the second."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def pack_nibbles(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def unpack_bits(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 8n] bits, the lowest first."""
    return (packed[..., None] >> _bit_numbers(packed) & 1).flatten(-2)


def pack_bits(bits: Tensor) -> Tensor:
    """The inverse. Eight bytes of 0 or 1 are one int64, and a product brings byte i to bit 56 + i."""
    octets = bits.contiguous().view(torch.int64)
    packed: Tensor = octets * _GATHER >> 56
    return packed.to(torch.uint8)


def split_last(tensor: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several; one of them may be -1."""
    return tensor.reshape(*tensor.shape[:-1], *sizes)


def as_half(pair: Tensor) -> Tensor:
    """[..., 2n] bytes -> [..., n] float16."""
    return pair.contiguous().view(torch.float16)


def half_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _unpack_fives(packed: Tensor) -> Tensor:
    """Four bytes of fifth bits, then nibbles."""
    return unpack_nibbles(packed[..., 4:]) | unpack_bits(packed[..., :4]) << 4


def _pack_fives(codes: Tensor) -> Tensor:
    return torch.cat((pack_bits(codes >> 4), pack_nibbles(codes & 15)), dim=-1)


def _bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
