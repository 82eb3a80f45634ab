"""Which tile multiplies how many tokens fastest: from measured tables, or by how the blocks fill the GPU."""

from __future__ import annotations

from dataclasses import replace

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.measured import WGMMA, kind_of, measured_tile
from aphroquant.kernels.cuda.integer.mma import ROWS as MMA_ROWS
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.tuning import Problem, tuned

_BATCH = 512  # tokens
_MAX_SPLIT = 8
_SHARED_BYTES = 227 * 1024  # of a multiprocessor
_RESERVED_BYTES = 1024  # for each block


def fits(tile: WgmmaTile, packed: PackedInteger) -> bool:
    """Whether its blocks have the shared memory, and each part of the columns a stage."""
    steps = packed.padded_columns // (CHUNK * tile.chunks)
    limit = _SHARED_BYTES // tile.blocks - (_RESERVED_BYTES if tile.blocks > 1 else 0)
    return tile.shared_bytes(packed) + packed.static_bytes <= limit and tile.split <= steps


def choose_wgmma_tile(packed: PackedInteger, tokens: int, device: int) -> WgmmaTile:
    """For a Hopper GPU: as measured for such codes, or else for those of 4 bits, with as many stages as fit."""
    measured = up_to_measured(tokens)
    tile = measured_tile(packed, measured, device, _SHARED_BYTES) or _measured_for_four_bits(packed, measured, device)
    fitting = None if tile is None else with_fewer_stages(tile, packed)
    return fitting or estimate(packed, tokens, gpu(device).multiprocessors)


def up_to_measured(tokens: int) -> int:
    """The next power of two, as the tables have them: a tile that is too narrow reads the weights twice."""
    return max(16, 1 << (tokens - 1).bit_length()) if tokens <= 2 * _BATCH else tokens


def _measured_for_four_bits(packed: PackedInteger, tokens: int, device: int) -> WgmmaTile | None:
    return tuned(WGMMA, WgmmaTile, Problem(kind_of(4), packed.out_features, packed.in_features, tokens), device)


def with_fewer_stages(tile: WgmmaTile, packed: PackedInteger) -> WgmmaTile | None:
    """With fewer stages, where its own are too large for this weight."""
    fewer = (replace(tile, stages=stages) for stages in range(tile.stages, 1, -1))
    return next((tile for tile in fewer if fits(tile, packed)), None)


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
