"""Super-blocks of 256 elements: sub-blocks of 16 or 32 whose small integer scales share one or two float16 factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats.gguf.simple_blocks import as_half, half_bytes, pack_bits, split_last, unpack_bits

Tensors = Mapping[str, Tensor]


def read_q2_k(blocks: Tensor) -> dict[str, Tensor]:
    packed = blocks[..., :16]  # a scale in the low nibble, a minimum in the high one
    return {
        "codes": _unpack_runs(blocks[..., 16:80], 2),
        "d": as_half(blocks[..., 80:82]),
        "dmin": as_half(blocks[..., 82:84]),
        "sub_scales": packed & 15,
        "sub_mins": packed >> 4,
    }


def write_q2_k(tensors: Tensors) -> Tensor:
    packed = tensors["sub_scales"] | tensors["sub_mins"] << 4
    tail = half_bytes(tensors["d"]), half_bytes(tensors["dmin"])
    return torch.cat((packed, _pack_runs(tensors["codes"], 2), *tail), dim=-1)


def read_q3_k(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "codes": _unpack_runs(blocks[..., 32:96], 2) | _unpack_planes(blocks[..., :32]) << 2,
        "d": as_half(blocks[..., 108:110]),
        "sub_scales": _unpack_sixes_by_rank(blocks[..., 96:108]),
    }


def write_q3_k(tensors: Tensors) -> Tensor:
    codes = tensors["codes"]
    parts = _pack_planes(codes >> 2), _pack_runs(codes & 3, 2), _pack_sixes_by_rank(tensors["sub_scales"])
    return torch.cat((*parts, half_bytes(tensors["d"])), dim=-1)


def read_q4_k(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _unpack_runs(blocks[..., 16:], 4), **_read_pairs(blocks[..., :16])}


def write_q4_k(tensors: Tensors) -> Tensor:
    return torch.cat((_write_pairs(tensors), _pack_runs(tensors["codes"], 4)), dim=-1)


def read_q5_k(blocks: Tensor) -> dict[str, Tensor]:
    codes = _unpack_runs(blocks[..., 48:], 4) | _unpack_planes(blocks[..., 16:48]) << 4
    return {"codes": codes, **_read_pairs(blocks[..., :16])}


def write_q5_k(tensors: Tensors) -> Tensor:
    codes = tensors["codes"]
    return torch.cat((_write_pairs(tensors), _pack_planes(codes >> 4), _pack_runs(codes & 15, 4)), dim=-1)


def read_q6_k(blocks: Tensor) -> dict[str, Tensor]:
    low = _unpack_runs(blocks[..., :128], 4, run=64)
    high = _unpack_runs(blocks[..., 128:192], 2)
    return {
        "codes": low | high << 4,
        "d": as_half(blocks[..., 208:]),
        "sub_scales": blocks[..., 192:208].contiguous().view(torch.int8),
    }


def write_q6_k(tensors: Tensors) -> Tensor:
    codes = tensors["codes"]
    parts = _pack_runs(codes & 15, 4, run=64), _pack_runs(codes >> 4, 2), tensors["sub_scales"].view(torch.uint8)
    return torch.cat((*parts, half_bytes(tensors["d"])), dim=-1)


def _unpack_runs(packed: Tensor, bits: int, run: int = 32) -> Tensor:
    """Each `run` of bytes holds 8 / bits times as many elements: those of the lowest bits come first."""
    runs = split_last(packed, -1, 1, run)
    fields: Tensor = runs >> _shifts(packed, bits) & (2**bits - 1)
    return fields.flatten(-3)


def _pack_runs(codes: Tensor, bits: int, run: int = 32) -> Tensor:
    layers = split_last(codes, -1, 8 // bits, run)
    return (layers << _shifts(codes, bits)).sum(dim=-2, dtype=torch.uint8).flatten(-2)


def _shifts(like: Tensor, bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]


def _unpack_planes(packed: Tensor) -> Tensor:
    """32 bytes as 256 bits: bit j of byte l belongs to element 32 j + l."""
    return split_last(unpack_bits(packed), 32, 8).transpose(-1, -2).flatten(-2)


def _pack_planes(bits: Tensor) -> Tensor:
    return pack_bits(split_last(bits, 8, 32).transpose(-1, -2).flatten(-2))


def _read_pairs(head: Tensor) -> dict[str, Tensor]:
    """d, dmin, and 12 bytes of eight 6-bit scales and minima: the first four of each whole, then the rest in parts."""
    first, second, third = head[..., 4:8], head[..., 8:12], head[..., 12:16]
    return {
        "d": as_half(head[..., :2]),
        "dmin": as_half(head[..., 2:4]),
        "sub_scales": torch.cat((first & 63, third & 15 | (first >> 6) << 4), dim=-1),
        "sub_mins": torch.cat((second & 63, third >> 4 | (second >> 6) << 4), dim=-1),
    }


def _write_pairs(tensors: Tensors) -> Tensor:
    scales, later_scales = tensors["sub_scales"].chunk(2, dim=-1)
    mins, later_mins = tensors["sub_mins"].chunk(2, dim=-1)
    first = scales | (later_scales >> 4) << 6
    second = mins | (later_mins >> 4) << 6
    third = later_scales & 15 | (later_mins & 15) << 4
    return torch.cat((half_bytes(tensors["d"]), half_bytes(tensors["dmin"]), first, second, third), dim=-1)


def _unpack_sixes_by_rank(packed: Tensor) -> Tensor:
    """12 bytes as sixteen integers of -32 .. 31: low nibbles in eight bytes, then the upper two bits, four a byte."""
    low = packed[..., :8]
    nibbles = torch.cat((low & 15, low >> 4), dim=-1)
    upper = packed[..., None, 8:] >> _shifts(packed, 2) & 3  # [..., 4, 4]
    return (nibbles | upper.flatten(-2) << 4).view(torch.int8) - 32


def _pack_sixes_by_rank(values: Tensor) -> Tensor:
    codes = (values + 32).view(torch.uint8)
    first, second = (codes & 15).chunk(2, dim=-1)
    upper = split_last(codes >> 4, 4, 4) << _shifts(codes, 2)
    return torch.cat((first | second << 4, upper.sum(dim=-2, dtype=torch.uint8)), dim=-1)
