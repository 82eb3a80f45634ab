"""Which tile multiplies how many tokens fastest: from measured tables, or by how the blocks fill the GPU."""

from __future__ import annotations

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.float8.wgmma import STEP, Float8Tile
from aphroquant.kernels.cuda.integer.tiles import up_to_measured
from aphroquant.kernels.cuda.tuning import Problem, tuned

TABLE = "float8_wgmma"
SCALES_OF_ROWS, SCALES_OF_BLOCKS = "scales of rows", "scales of blocks"
_BATCH = 512  # tokens
_MAX_SPLIT = 8
_SHARED_BYTES = 227 * 1024  # of a multiprocessor
_RESERVED_BYTES = 1024  # for each block
_MAX_BLOCK_SUMS = 128  # tokens times tiles: with scales of blocks a thread has its sums twice


def fits(tile: Float8Tile, columns: int, has_blocks: bool) -> bool:
    """Whether its blocks have the shared memory, its threads the registers, and each part of the columns a stage."""
    if has_blocks and tile.tokens * tile.tiles > _MAX_BLOCK_SUMS:
        return False
    limit = _SHARED_BYTES // tile.blocks - (_RESERVED_BYTES if tile.blocks > 1 else 0)
    return tile.shared_bytes(has_blocks) <= limit and tile.split <= -(-columns // STEP)


def choose_tile(rows: int, columns: int, tokens: int, device: int, has_blocks: bool) -> Float8Tile:
    """The tile for a product of that size: as measured, where such a tile fits."""
    for kind in (SCALES_OF_BLOCKS, SCALES_OF_ROWS) if has_blocks else (SCALES_OF_ROWS,):
        tile = tuned(TABLE, Float8Tile, Problem(kind, rows, columns, up_to_measured(tokens)), device)
        if tile is not None and fits(tile, columns, has_blocks):
            return tile
    return estimate(rows, columns, tokens, gpu(device).multiprocessors, has_blocks)


def estimate(rows: int, columns: int, tokens: int, multiprocessors: int, has_blocks: bool) -> Float8Tile:
    """Where nothing was measured, or where that does not fit."""
    if tokens > _BATCH:
        return Float8Tile(128 if has_blocks else 256, stages=5 if has_blocks else 3, persistent=True)
    width = next((width for width in (16, 32, 64) if tokens <= width), 128)
    blocks = -(-rows // 128) * -(-tokens // width)
    steps = -(-columns // STEP)
    split = 1
    while split < _MAX_SPLIT and blocks * split * 2 <= multiprocessors * 1.1 and steps >= split * 4:
        split *= 2
    return Float8Tile(width, stages=5 if width > 64 else 6, split=split)
