"""Which tile multiplies how many tokens fastest: from measured tables, or by how the blocks fill the GPU."""

from __future__ import annotations

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.measured import measured_tile
from aphroquant.kernels.cuda.integer.mma import ROWS as MMA_ROWS
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile

_BATCH = 512  # tokens
_MAX_SPLIT = 8
_SHARED_BYTES = 227 * 1024  # of a multiprocessor
_RESERVED_BYTES = 1024  # for each block


def fits(tile: WgmmaTile, packed: PackedInteger) -> bool:
    """Whether its blocks have the shared memory, and each part of the columns a stage."""
    steps = packed.padded_columns // (CHUNK * tile.chunks)
    limit = _SHARED_BYTES // tile.blocks - (_RESERVED_BYTES if tile.blocks > 1 else 0)
    return tile.shared_bytes(packed) <= limit and tile.split <= steps


def choose_wgmma_tile(packed: PackedInteger, tokens: int, device: int) -> WgmmaTile:
    """For a Hopper GPU: as measured, where such a tile fits."""
    tile = measured_tile(packed, tokens, device, _SHARED_BYTES)
    return tile if tile is not None and fits(tile, packed) else estimate(packed, tokens, gpu(device).multiprocessors)


def estimate(packed: PackedInteger, tokens: int, multiprocessors: int) -> WgmmaTile:
    """Where nothing was measured, or where that does not fit."""
    if tokens > _BATCH:
        tiles = [WgmmaTile(256, chunks=1, stages=stages, persistent=True) for stages in (4, 3, 2)]
    else:
        width = next((width for width in (16, 32, 64) if tokens <= width), 128)
        blocks = -(-packed.out_features // 128) * -(-tokens // width)
        split = _split(blocks, packed.padded_columns // (2 * CHUNK), multiprocessors)
        tiles = [WgmmaTile(width, stages=stages, split=split) for stages in (5, 4, 3, 2)]
    return next(tile for tile in tiles if fits(tile, packed))


def choose_mma_tile(packed: PackedInteger, tokens: int, multiprocessors: int) -> MmaTile:
    """For any GPU since Ampere."""
    width = next((width for width in (16, 32) if tokens <= width), 64)
    blocks = -(-packed.out_features // MMA_ROWS) * -(-tokens // width)
    return MmaTile(width, stages=4, split=_split(blocks, packed.padded_columns // CHUNK, multiprocessors))


def _split(blocks: int, steps: int, multiprocessors: int) -> int:
    """Parts of the columns, so that the blocks fill the GPU once."""
    split = 1
    while split < _MAX_SPLIT and blocks * split * 2 <= multiprocessors * 1.1 and steps >= split * 4:
        split *= 2
    return split
