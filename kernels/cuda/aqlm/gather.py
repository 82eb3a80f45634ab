"""The kernel for a few tokens and any number and size of codebooks: entries gathered into matrix fragments."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.aqlm.packing import LANES, TILE_ROWS, PackedAdditive
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.schemes import AdditiveScheme

SOURCE, ENTRY = "aqlm_gather.cu", "aqlm_gather"
TOKENS_OF_TILE = 8


class Problem(Structure):
    """As in aqlm_gather.cu."""

    _fields_ = (
        ("rows", c_int32),
        ("groups", c_int32),
        ("tokens", c_int32),
        ("slices", c_int32),
        ("row_tiles", c_int32),
        ("codes", c_void_p),
        ("books", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("output", c_void_p),
    )


@dataclass(frozen=True)
class GatherPlan:
    """How a block reads the codebooks: copies of all entries in shared memory, or the first `hot` ones there."""

    warps: int = 16
    blocks: int = 1  # on a multiprocessor
    copies: int = 8
    hot: int = 0

    def shared_bytes(self, scheme: AdditiveScheme) -> int:
        entry = scheme.in_group * 2
        books = self.copies * scheme.num_codebooks * 2**scheme.code_bits * entry if self.copies else self.hot * entry
        return books + self.warps * TOKENS_OF_TILE * TILE_ROWS * 4

    def macros(self, packed: PackedAdditive, token_tiles: int) -> dict[str, Macro]:
        scheme = packed.scheme
        return {
            "ELEMENT_IS_BF16": int(packed.codebooks.dtype == torch.bfloat16),
            "CODEBOOKS": scheme.num_codebooks,
            "CODE_BYTES": packed.layout.code_bytes,
            "CODE_BITS": scheme.code_bits,
            "IN_GROUP": scheme.in_group,
            "TOKEN_TILES": token_tiles,
            "COPIES": self.copies,
            "HOT": self.hot,
            "WARPS": self.warps,
            "BLOCKS": self.blocks,
        }


def gather_multiply(
    packed: PackedAdditive, x: Tensor, bias: Tensor | None, out: Tensor, token_tiles: int, plan: GatherPlan, grid: int
) -> None:
    """x [T, K] -> out [T, N], for T up to 8 * token_tiles, by `grid` blocks."""
    slices, row_tiles = packed.codes.shape[:2]
    problem = Problem(
        packed.out_features,
        packed.num_groups,
        x.shape[0],
        slices,
        row_tiles,
        packed.codes.data_ptr(),
        packed.codebooks.data_ptr(),
        packed.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
    )
    cuda_kernel(SOURCE, ENTRY, plan.macros(packed, token_tiles)).launch(
        grid=(min(grid, row_tiles), 1, 1),
        block=(plan.warps * LANES, 1, 1),
        args=[problem],
        shared_bytes=plan.shared_bytes(packed.scheme),
        programmatic=True,
    )
