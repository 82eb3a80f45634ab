"""Which tile multiplies how many tokens fastest."""

from __future__ import annotations

from aphroquant.kernels.cuda.integer.mma import ROWS as MMA_ROWS
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile

_FEW, _BATCH = 64, 512  # tokens
_MAX_SPLIT = 8
_SHARED_BYTES = 227 * 1024


def choose_wgmma_tile(packed: PackedInteger, tokens: int, multiprocessors: int) -> WgmmaTile:
    """For a Hopper GPU."""
    if tokens > _BATCH:
        tile = WgmmaTile(256, chunks=1, stages=4, multicast=2, persistent=True)
        if tile.shared_bytes(packed) > _SHARED_BYTES:
            tile = WgmmaTile(256, chunks=1, stages=3, multicast=2, persistent=True)
        return tile
    width = 128
    if tokens <= _FEW:
        width = next(width for width in (16, 32, 64) if tokens <= width)
    blocks = -(-packed.out_features // 128) * -(-tokens // width)
    split = _split(blocks, packed.padded_columns // (2 * CHUNK), multiprocessors)
    stages = 4 if width == 128 else 5
    while True:
        tile = WgmmaTile(width, stages=stages, split=split)
        if tile.shared_bytes(packed) <= _SHARED_BYTES:
            return tile
        stages -= 1


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
