"""Rows of an AQLM weight as dense numbers, and products with them: the way for many tokens."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.aqlm.packing import TILE_ROWS, PackedAdditive
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.schemes import AdditiveScheme

SOURCE, ENTRY = "aqlm_dequantize.cu", "aqlm_dequantize"
THREADS = 256
_BLOCKS = 3  # on a multiprocessor
_COPIED_BYTES = 72 << 10  # of shared memory, for copies of codebooks


class Problem(Structure):
    """As in aqlm_dequantize.cu."""

    _fields_ = (
        ("rows", c_int32),
        ("groups", c_int32),
        ("slices", c_int32),
        ("row_tiles", c_int32),
        ("first_tile", c_int32),
        ("tiles", c_int32),
        ("codes", c_void_p),
        ("books", c_void_p),
        ("scales", c_void_p),
        ("output", c_void_p),
    )


@dataclass(frozen=True)
class DequantizePlan:
    """`workspace` MiB of dense rows are made at a time: few stay in L2 until they are multiplied."""

    workspace: int = 32


def copies_within(scheme: AdditiveScheme, num_bytes: int) -> int:
    """How many copies of all codebooks fit: a power of two up to 8 (16 of half vectors); 0 if there is no room."""
    one = scheme.num_codebooks * 2**scheme.code_bits * scheme.in_group * 2
    copies = 8 if scheme.in_group % 8 == 0 else 16
    while copies and copies * one > num_bytes:
        copies //= 2
    return copies


def macros(packed: PackedAdditive) -> dict[str, Macro]:
    scheme = packed.scheme
    return {
        "ELEMENT_IS_BF16": int(packed.codebooks.dtype == torch.bfloat16),
        "CODEBOOKS": scheme.num_codebooks,
        "CODE_BYTES": packed.layout.code_bytes,
        "CODE_BITS": scheme.code_bits,
        "IN_GROUP": scheme.in_group,
        "COPIES": copies_within(scheme, _COPIED_BYTES),
        "BLOCKS": _BLOCKS,
    }


def dequantize_rows(packed: PackedAdditive, first: int, out: Tensor, multiprocessors: int) -> None:
    """The rows from `first`, a multiple of 32, to out [rows, K] in the dtype of the codebooks."""
    scheme = packed.scheme
    slices, row_tiles = packed.codes.shape[:2]
    tiles = -(-out.shape[0] // TILE_ROWS)
    problem = Problem(
        out.shape[0],
        packed.num_groups,
        slices,
        row_tiles,
        first // TILE_ROWS,
        tiles,
        packed.codes.data_ptr(),
        packed.codebooks.data_ptr(),
        packed.scales[first:].data_ptr(),
        out.data_ptr(),
    )
    books = copies_within(scheme, _COPIED_BYTES) * scheme.num_codebooks * 2**scheme.code_bits * scheme.in_group * 2
    cuda_kernel(SOURCE, ENTRY, macros(packed)).launch(
        grid=(min(tiles * slices, _BLOCKS * multiprocessors), 1, 1),
        block=(THREADS, 1, 1),
        args=[problem],
        shared_bytes=books,
        programmatic=True,
    )


def dequantize_multiply(
    packed: PackedAdditive, x: Tensor, bias: Tensor | None, out: Tensor, plan: DequantizePlan, multiprocessors: int
) -> None:
    """x [T, K] -> out [T, N]."""
    rows, columns = packed.out_features, packed.in_features
    step = max(1, (plan.workspace << 20) // (2 * columns) // TILE_ROWS) * TILE_ROWS
    for first in range(0, rows, step):
        stop = min(rows, first + step)
        dense = x.new_empty(stop - first, columns)
        dequantize_rows(packed, first, dense, multiprocessors)
        torch.mm(x, dense.T, out=out[:, first:stop])
    if bias is not None:
        out += bias
