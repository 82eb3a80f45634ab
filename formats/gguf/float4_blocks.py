"""Blocks of four-bit codes into a table: MXFP4 and NVFP4, whose table is E2M1, and IQ4_NL with one of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats.gguf.simple_blocks import as_half, half_bytes, pack_nibbles, split_last, unpack_nibbles

Tensors = Mapping[str, Tensor]
_NAN = 0x7F  # of E4M3; llama.cpp reads such a scale as zero


def read_iq4_nl(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": unpack_nibbles(blocks[..., 2:]), "scales": as_half(blocks[..., :2])}


def write_iq4_nl(tensors: Tensors) -> Tensor:
    return torch.cat((half_bytes(tensors["scales"]), pack_nibbles(tensors["codes"])), dim=-1)


def read_mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    exponents = blocks[..., :1].contiguous().view(torch.float8_e8m0fnu)
    return {"codes": unpack_nibbles(blocks[..., 1:]), "scales": exponents}


def write_mxfp4(tensors: Tensors) -> Tensor:
    return torch.cat((tensors["scales"].view(torch.uint8), pack_nibbles(tensors["codes"])), dim=-1)


def read_nvfp4(blocks: Tensor) -> dict[str, Tensor]:
    scales = blocks[..., :4] & 0x7F  # without a sign
    scales = torch.where(scales == _NAN, 0, scales)
    codes = unpack_nibbles(split_last(blocks[..., 4:], 4, 8))  # [N, blocks, 4, 16]
    return {"codes": codes, "scales": scales.view(torch.float8_e4m3fn)}


def write_nvfp4(tensors: Tensors) -> Tensor:
    packed = pack_nibbles(split_last(tensors["codes"], 4, 16)).flatten(-2)
    return torch.cat((tensors["scales"].view(torch.uint8), packed), dim=-1)
