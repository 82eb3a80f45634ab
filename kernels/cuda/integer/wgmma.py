"""The wgmma kernel of Hopper GPUs for many tokens: its tiles, and its launch."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.packing import CHUNK, ROWS, PackedInteger
from aphroquant.kernels.cuda.integer.problem import PackedWeights, packed_macros, super_row_bytes
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

SOURCE, ENTRY = "integer_wgmma.cu", "integer_wgmma"


@dataclass(frozen=True)
class WgmmaTile:
    """How the kernel cuts a product: a block multiplies warpgroups * tiles * 64 rows of the weight with `tokens`.

    `split` blocks share the columns of a tile, `multicast` blocks their tokens; `persistent` ones take tile after tile,
    `token_group` tiles of tokens side by side, the first of two warpgroups `lead` steps ahead. `cut`: rows that do not
    fill the GPU once more go to a launch of their own.
    """

    tokens: int
    warpgroups: int = 2
    tiles: int = 1
    chunks: int = 2
    stages: int = 4
    steps: int = 1
    split: int = 1
    multicast: int = 1
    persistent: bool = False
    blocks: int = 1
    token_group: int = 4
    lead: int = 0
    cut: bool = False

    @property
    def rows(self) -> int:
        return self.warpgroups * self.tiles * ROWS

    @property
    def cluster(self) -> int:
        return self.split * self.multicast

    def macros(self, packed: PackedInteger, dtype: torch.dtype) -> dict[str, Macro]:
        return packed_macros(packed, dtype, self.chunks) | {
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "STEPS": self.steps,
            "SPLIT": self.split,
            "MULTICAST": self.multicast,
            "PERSISTENT": self.persistent,
            "BLOCKS": self.blocks,
            "TOKEN_GROUP": self.token_group,
            "LEAD": self.lead,
        }

    def stage_bytes(self, packed: PackedInteger) -> int:
        weights = self.warpgroups * self.tiles * super_row_bytes(packed, self.chunks)
        return self.chunks * self.tokens * CHUNK * 2 + weights

    def shared_bytes(self, packed: PackedInteger) -> int:
        """As the kernel computes it."""
        stages = self.stages * self.stage_bytes(packed)
        if self.split > 1:
            output = self.tokens * (self.rows + 4) * 4
        else:
            piece = 64 if self.tokens % 64 == 0 else self.tokens
            output = self.warpgroups * piece * (self.tiles * ROWS + 8) * 2
        payload = _up(stages, 128) + output if self.persistent else max(stages, output)
        share = self.tokens // self.split * (self.rows + 4) * 4
        received = _up(payload, 128) + (self.split - 1) * share
        return _up(received, 16) + self.stages * 16 + 16 + 1024


class _Problem(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("steps", c_int32),
        ("row_tiles", c_int32),
        ("token_tiles", c_int32),
        ("first_row_tile", c_int32),
        ("weights", PackedWeights),
        ("values", c_void_p),
        ("bias", c_void_p),
    )


def wgmma_multiply(
    packed: PackedInteger,
    x: Tensor,
    bias: Tensor | None,
    tile: WgmmaTile,
    exponent: int = 0,
    out: Tensor | None = None,
    multiprocessors: int | None = None,
    rows: range | None = None,
) -> Tensor:
    """x [T, columns in packed order] -> [T, N]; columns that x lacks are 0. `exponent`: of `scale_exponent`.

    The rows of x begin at multiples of 16 bytes; bias is float32. Persistent blocks fill `multiprocessors`, or all.
    `rows`: of the weight, the only ones that are multiplied; from one multiple of tile.rows to another, or to the end.
    """
    tokens = x.shape[0]
    if out is None:
        out = x.new_empty(tokens, packed.out_features)
    rows = rows or range(packed.out_features)
    row_tiles, token_tiles = -(-len(rows) // tile.rows), -(-tokens // tile.tokens)
    problem = _Problem(
        packed.out_features,
        tokens,
        packed.padded_columns // (CHUNK * tile.chunks),
        row_tiles,
        token_tiles,
        rows.start // tile.rows,
        PackedWeights.of(packed, exponent, x.dtype),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    clusters = -(-row_tiles // tile.multicast) * token_tiles
    if tile.persistent:
        multiprocessors = multiprocessors or gpu(x.get_device()).multiprocessors
        clusters = min(clusters, multiprocessors * tile.blocks // tile.cluster)
    inputs = TensorMap.of(x, (tile.tokens // tile.multicast, CHUNK), swizzle=128)
    cuda_kernel(SOURCE, ENTRY, tile.macros(packed, x.dtype)).launch(
        grid=(clusters * tile.cluster, 1, 1),
        block=((tile.warpgroups + 1) * 128, 1, 1),
        args=[inputs, problem],
        shared_bytes=tile.shared_bytes(packed),
        cluster=(tile.cluster, 1, 1) if tile.cluster > 1 else None,
        programmatic=True,
    )
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
