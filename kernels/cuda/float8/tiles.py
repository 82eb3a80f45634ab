"""Which tile multiplies how many tokens fastest; measured on an H100 (scripts/tune_cuda.py)."""

from __future__ import annotations

from aphroquant.kernels.cuda.float8.wgmma import Float8Tile

_PERSISTENT_TOKENS = 512


def choose_tile(rows: int, columns: int, tokens: int, multiprocessors: int, has_blocks: bool) -> Float8Tile:
    """The tile for a product of that size."""
    if tokens <= 64:
        width = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        return _spread(width, rows, columns, tokens, multiprocessors)
    if tokens <= _PERSISTENT_TOKENS:
        return _spread(128, rows, columns, tokens, multiprocessors)
    if has_blocks:
        return Float8Tile(128, stages=5, persistent=True)
    return Float8Tile(256, stages=3, multicast=2, persistent=True)


def _spread(width: int, rows: int, columns: int, tokens: int, multiprocessors: int) -> Float8Tile:
    """As many parts of the columns as fill the GPU."""
    blocks = -(-rows // 128) * -(-tokens // width)
    steps = -(-columns // 128)
    split = 1
    while split < 8 and blocks * split * 2 <= multiprocessors * 1.1 and steps >= split * 4:
        split *= 2
    return Float8Tile(width, stages=5 if width > 64 else 6, split=split)
