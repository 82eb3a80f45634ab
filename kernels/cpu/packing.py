"""Weights as the compiled kernels stream them (the layouts are described in src/abi.h).

The columns are brought into group order, cut into chunks that never cross a group, and packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cpu.abi import (
    DENSE_KINDS,
    FLOAT_TYPES,
    KIND_CODES,
    KIND_FP8,
    OFFSETS,
    ZEROS_U8,
    LinearStruct,
    address,
    aligned_bytes,
)
from aphroquant.kernels.cpu.grouped import GroupedWeight

BLOCK = 16  # outputs of a block
# Columns that share one scale of a row in the fast mode. 64 would make long prompts 8 % faster, and costs accuracy: the
# KL divergence from unrounded inputs is 0.0052 instead of 0.0029 (SmolLM2-135M, AWQ, 1000 tokens of Wikipedia).
MAX_CHUNK = 32
MAX_ROW_CHUNK = 256  # with one scale a row: an 8-bit dot product of a chunk stays below 2**24, exact in float32


@dataclass(frozen=True)
class PackedWeight:
    """A filled struct and the tensors that it points to."""

    struct: LinearStruct
    tensors: tuple[Tensor, ...]


def pack(weight: GroupedWeight, bias: Tensor | None, *, max_chunk: int) -> PackedWeight:
    """The weight in the kernels' layout. `max_chunk` bounds the columns that share one integer dot product."""
    struct = LinearStruct(out_features=weight.shape[0], in_features=weight.shape[1])
    if weight.kind == "dense":
        tensors = _pack_dense(struct, weight)
    elif weight.kind == "fp8":
        tensors = _pack_fp8(struct, weight)
    else:
        tensors = _pack_codes(struct, weight, max_chunk)
    if bias is not None:
        padded = _pad_outputs(bias.float()).contiguous()
        struct.bias = address(padded)
        tensors = [*tensors, padded]
    return PackedWeight(struct, tuple(tensors))


def _pack_dense(struct: LinearStruct, weight: GroupedWeight) -> list[Tensor]:
    struct.kind = DENSE_KINDS[weight.codes.dtype]
    struct.padded_in = struct.in_features
    struct.codes = address(weight.codes)
    return [weight.codes]


def _pack_fp8(struct: LinearStruct, weight: GroupedWeight) -> list[Tensor]:
    assert weight.scales is not None
    k = weight.shape[1]
    num_groups = weight.scales.shape[1]
    codes = _aligned(_pad_outputs(weight.codes).view(-1, BLOCK, k).transpose(1, 2))  # [N/16, K, 16]
    scales = _by_block(weight.scales)
    chunk_groups = torch.arange(num_groups, dtype=torch.int32)
    struct.kind, struct.bits, struct.padded_in = KIND_FP8, 8, k
    struct.chunk_len = k if num_groups == 1 else int((weight.group_index == 0).sum())
    struct.num_chunks = struct.num_groups = num_groups
    struct.codes, struct.scales, struct.chunk_groups = address(codes), address(scales), address(chunk_groups)
    struct.scale_type = FLOAT_TYPES[scales.dtype]
    return [codes, scales, chunk_groups]


def _pack_codes(struct: LinearStruct, weight: GroupedWeight, max_chunk: int) -> list[Tensor]:
    assert weight.scales is not None
    bits = next(width for width in (2, 4, 8) if weight.bits <= width)
    num_groups = weight.scales.shape[1]
    chunk_len, columns, chunk_groups = _chunks(weight.group_index, num_groups, 32 // bits, max_chunk)
    in_order = torch.equal(columns, torch.arange(weight.shape[1], dtype=torch.int32))
    codes = _lines(weight.codes if in_order else _gather_columns(weight.codes, columns), bits)
    scale_type = _exact_type([weight.scales] if weight.offsets is None else [weight.scales, weight.offsets])
    scales = _by_block(weight.scales.to(scale_type))
    if weight.offsets is None:
        assert weight.zeros is not None
        offsets = _by_block(weight.zeros)
    else:
        offsets = _by_block(weight.offsets.to(scale_type))
    tensors = [codes, scales, offsets, chunk_groups]
    if not in_order:
        struct.columns = address(columns)
        tensors.append(columns)
    struct.kind, struct.bits, struct.padded_in = KIND_CODES, bits, columns.shape[0]
    struct.chunk_len, struct.num_chunks, struct.num_groups = chunk_len, chunk_groups.shape[0], num_groups
    struct.codes, struct.scales, struct.offsets = address(codes), address(scales), address(offsets)
    struct.chunk_groups = address(chunk_groups)
    if weight.table is not None:
        table = weight.table.float().contiguous()
        struct.table = address(table)
        tensors.append(table)
    struct.scale_type = FLOAT_TYPES[scale_type]
    struct.offset_kind = ZEROS_U8 if weight.offsets is None else OFFSETS
    return tensors


def _chunks(group_index: Tensor, num_groups: int, unit: int, max_chunk: int) -> tuple[int, Tensor, Tensor]:
    """(chunk_len, source columns int32 [padded] with -1 for padding, group of each chunk int32).

    Columns are taken group by group; every group is padded to whole chunks, so that none crosses a border.
    """
    sizes = torch.bincount(group_index, minlength=num_groups)
    lengths = range(unit, max(max_chunk, unit) + 1, unit)
    # A chunk costs its lines and, once, about 3 columns' quads for scaling; on a tie the longer one.
    chunk_len = min(lengths, key=lambda c: (int((-(-sizes // c)).sum()) * (c // 4 + 3), -c))
    per_group = -(-sizes // chunk_len)  # [G]
    chunk_groups = torch.repeat_interleave(torch.arange(num_groups), per_group)
    columns = torch.full((int(per_group.sum()) * chunk_len,), -1, dtype=torch.int32)
    order = torch.argsort(group_index, stable=True)
    starts_padded = torch.cumsum(per_group * chunk_len, 0) - per_group * chunk_len
    starts = torch.cumsum(sizes, 0) - sizes
    groups = group_index[order]
    columns[starts_padded[groups] + torch.arange(order.shape[0]) - starts[groups]] = order.to(torch.int32)
    return chunk_len, columns, chunk_groups.to(torch.int32)


def _gather_columns(codes: Tensor, columns: Tensor) -> Tensor:
    gathered = codes[:, columns.clamp(min=0).long()]
    gathered[:, columns < 0] = 0
    return gathered


def _lines(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, padded] -> [N/16, lines, 64]: successive steps of 4 columns share a line's bytes."""
    steps_per_line = 8 // bits
    padded = _pad_outputs(codes)
    quads = padded.view(-1, BLOCK, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()  # [N/16, steps, 16, 4]
    steps = quads.view(quads.shape[0], -1, steps_per_line, BLOCK * 4)
    lines = aligned_bytes(steps.shape[0] * steps.shape[1] * BLOCK * 4).view(steps.shape[0], steps.shape[1], BLOCK * 4)
    lines.copy_(steps[:, :, 0])
    for step in range(1, steps_per_line):
        lines |= steps[:, :, step] << (step * bits)
    return lines


def _by_block(values: Tensor) -> Tensor:
    """[N, G] -> [N/16, G, 16]."""
    return _aligned(_pad_outputs(values).view(-1, BLOCK, values.shape[1]).transpose(1, 2))


def _pad_outputs(values: Tensor) -> Tensor:
    missing = -values.shape[0] % BLOCK
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])


def _aligned(values: Tensor) -> Tensor:
    memory = aligned_bytes(values.numel() * values.element_size()).view(values.dtype).view(values.shape)
    return memory.copy_(values)


def _exact_type(values: list[Tensor]) -> torch.dtype:
    """The narrowest type that holds all values exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(value.to(dtype).to(torch.float64), value.to(torch.float64)) for value in values):
            return dtype
    return torch.float32
