"""The FP8 wgmma kernel: its tiles, and its launch."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

SOURCE, ENTRY = "float8_wgmma.cu", "float8_wgmma"
STEP = 128  # columns of a stage


@dataclass(frozen=True)
class Float8Tile:
    """How the kernel cuts a product: a block multiplies warpgroups * tiles * 64 rows of the weight with `tokens`.

    `split` blocks share the columns of a tile, `multicast` blocks their tokens; `persistent` ones take tile after tile,
    `token_group` tiles of tokens side by side, the first of two warpgroups `lead` steps ahead.
    """

    tokens: int
    warpgroups: int = 2
    tiles: int = 1
    stages: int = 4
    split: int = 1
    multicast: int = 1
    persistent: bool = False
    blocks: int = 1
    token_group: int = 4
    lead: int = 0

    @property
    def rows(self) -> int:
        return self.warpgroups * self.tiles * 64

    @property
    def cluster(self) -> int:
        return self.split * self.multicast

    def macros(self, dtype: torch.dtype, block_rows: int | None) -> dict[str, Macro]:
        """`block_rows`: of a block of weights with one scale; None for scales of rows and tokens."""
        macros: dict[str, Macro] = {
            "BFLOAT": dtype == torch.bfloat16,
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "MULTICAST": self.multicast,
            "PERSISTENT": self.persistent,
            "BLOCKS": self.blocks,
            "TOKEN_GROUP": self.token_group,
            "LEAD": self.lead,
        }
        return macros if block_rows is None else macros | {"SCALES": 1, "SCALE_ROWS": block_rows}

    def shared_bytes(self, has_blocks: bool) -> int:
        """As the kernel computes it."""
        stages = self.stages * ((self.tokens + self.rows) * STEP + (1024 if has_blocks else 0))
        if self.split > 1:
            output = self.tokens * (self.rows + 4) * 4
        else:
            piece = 64 if self.tokens % 64 == 0 else self.tokens
            output = self.warpgroups * piece * (self.tiles * 64 + 8) * 2
        payload = _up(stages, 128) + output if self.persistent else max(stages, output)
        share = self.tokens // self.split * (self.rows + 4) * 4
        received = _up(payload, 128) + (self.split - 1) * share
        scales = 0 if has_blocks else self.warpgroups * self.tokens * 4
        return _up(_up(received, 16) + scales, 8) + self.stages * 16 + 16 + 1024


class _Problem(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("steps", c_int32),
        ("row_tiles", c_int32),
        ("token_tiles", c_int32),
        ("first_row_tile", c_int32),
        ("token_stride", c_int32),
        ("row_stride", c_int32),
        ("padded_tokens", c_int32),
        ("scale_columns", c_int32),
        ("token_scales", c_void_p),
        ("row_scales", c_void_p),
        ("values", c_void_p),
        ("bias", c_void_p),
    )


def float8_multiply(
    weight: Tensor,
    row_scales: Tensor,
    x: Tensor,
    token_scales: Tensor,
    tile: Float8Tile,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    block_rows: int | None = None,
    out: Tensor | None = None,
    multiprocessors: int | None = None,
) -> Tensor:
    """e4m3 x [T, K] times e4m3 weight [N, K]: [T, N] in `dtype`. Rows begin at multiples of 16 bytes.

    Scales and bias are float32 and contiguous: [N] or one, and [T] or one; with `block_rows` [blocks of rows, blocks of
    128 columns], and [blocks of 128 columns, T padded to tile.tokens].
    """
    rows, columns = weight.shape
    tokens = x.shape[0]
    if out is None:
        out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    problem = _Problem(
        rows,
        tokens,
        -(-columns // STEP),
        row_tiles,
        token_tiles,
        0,
        int(token_scales.numel() > 1),
        int(row_scales.numel() > 1),
        token_scales.shape[-1] if block_rows is not None else 0,
        row_scales.shape[-1] if block_rows is not None else 0,
        token_scales.data_ptr(),
        row_scales.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    clusters = -(-row_tiles // tile.multicast) * token_tiles
    if tile.persistent:
        multiprocessors = multiprocessors or gpu(x.get_device()).multiprocessors
        clusters = min(clusters, multiprocessors * tile.blocks // tile.cluster)
    inputs = TensorMap.of(x, (tile.tokens // tile.multicast, STEP), swizzle=128)
    weights = TensorMap.of(weight, (tile.rows, STEP), swizzle=128)
    cuda_kernel(SOURCE, ENTRY, tile.macros(dtype, block_rows)).launch(
        grid=(clusters * tile.cluster, 1, 1),
        block=((tile.warpgroups + 1) * 128, 1, 1),
        args=[inputs, weights, problem],
        shared_bytes=tile.shared_bytes(block_rows is not None),
        cluster=(tile.cluster, 1, 1) if tile.cluster > 1 else None,
        programmatic=True,
    )
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
