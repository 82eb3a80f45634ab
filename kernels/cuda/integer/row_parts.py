"""Products in two launches: the rows whose tiles fill the GPU, and the rest in smaller tiles.

Where the tiles of a product are few more than a multiple of the multiprocessors, most of those would stand idle at the
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile, wgmma_multiply

_REST_TOKENS, _REST_ROWS = 128, 128
_MAX_SPLIT = 8
_STEPS_OF_PART = 4  # at least

Part = tuple[range, WgmmaTile]


def row_parts(rows: int, columns: int, tokens: int, tile: WgmmaTile, multiprocessors: int) -> list[Part]:
    """Which rows are multiplied in which tiles: all in one, or with `tile.cut` in two. `columns`: as packed."""
    first = _rows_that_fill(rows, tokens, tile, multiprocessors) if tile.cut else rows
    if not 0 < first < rows:
        return [(range(rows), tile)]
    return [(range(first), tile), (range(first, rows), _rest_tile(rows - first, columns, tokens, multiprocessors))]


def multiply_parts(
    packed: PackedInteger,
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Part],
    exponent: int = 0,
    out: Tensor | None = None,
    multiprocessors: int | None = None,
) -> Tensor:
    """As wgmma_multiply, a launch for each of `row_parts`."""
    if out is None:
        out = x.new_empty(x.shape[0], packed.out_features)
    for rows, tile in parts:
        wgmma_multiply(packed, x, bias, tile, exponent, out, multiprocessors, rows)
    return out


def _rows_that_fill(rows: int, tokens: int, tile: WgmmaTile, multiprocessors: int) -> int:
    """Of whole rounds of tiles; a multiple of the rest's rows."""
    token_tiles, row_tiles = -(-tokens // tile.tokens), rows // tile.rows
    rounds = row_tiles * token_tiles // multiprocessors
    unit = max(tile.rows * tile.multicast, _REST_ROWS)
    return rounds * multiprocessors // token_tiles * tile.rows // unit * unit


def _rest_tile(rows: int, columns: int, tokens: int, multiprocessors: int) -> WgmmaTile:
    blocks = -(-rows // _REST_ROWS) * -(-tokens // _REST_TOKENS)
    tile = WgmmaTile(_REST_TOKENS, stages=3)
    steps, split = columns // (CHUNK * tile.chunks), 1
    while split < _MAX_SPLIT and blocks * split * 2 <= multiprocessors and steps >= split * 2 * _STEPS_OF_PART:
        split *= 2
    return replace(tile, split=split)
