"""What scripts/tune_kernels tries for the FP8 kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.layer_shapes import layer_shapes
from aphroquant.kernels.cuda.float8.tiles import SCALES_OF_BLOCKS, SCALES_OF_ROWS, TABLE, fits
from aphroquant.kernels.cuda.float8.wgmma import SOURCE, STEP, Float8Tile, float8_multiply
from aphroquant.kernels.cuda.tuning import Problem, Tunable
from aphroquant.kernels.cuda.variants import Macro

_MODELS = ("llama-3-8b", "llama-3-70b")
_TOKENS = (1, 32, 64, 128, 256, 512, 1024, 4096)
_BLOCK_ROWS = 128
_DTYPE = torch.bfloat16
_MULTIPROCESSORS = 132  # about: only to leave out what cannot be fastest
_FEW, _BATCH = 64, 512  # tokens


def problems() -> Iterator[Problem]:
    for kind, model in itertools.product((SCALES_OF_ROWS, SCALES_OF_BLOCKS), _MODELS):
        for tokens, shape in itertools.product(_TOKENS, layer_shapes(model)):
            yield Problem(kind, shape.out_features, shape.in_features, tokens)


def candidates(problem: Problem) -> list[Float8Tile]:
    """Tiles that fill the GPU about once, or are taken one after another."""
    has_blocks = problem.kind == SCALES_OF_BLOCKS
    return [tile for tile in _tiles(problem) if fits(tile, problem.in_features, has_blocks)]


def _tiles(problem: Problem) -> Iterator[Float8Tile]:
    if problem.tokens <= _FEW:
        yield from (tile for tile in _narrow_tiles(problem.tokens) if _fills(tile, problem))
        return
    if problem.tokens <= _BATCH:
        yield from (tile for tile in _medium_tiles() if _fills(tile, problem))
    for tile in _lasting_tiles():
        if _num_blocks(tile, problem) > _MULTIPROCESSORS:
            yield tile


def _narrow_tiles(tokens: int) -> Iterator[Float8Tile]:
    width = next(width for width in (16, 32, 64) if tokens <= width)
    rows, places = ((1, 1), (2, 1)), ((1, 8), (1, 6), (2, 4), (3, 3))
    for shape, split, (blocks, stages) in itertools.product(rows, (1, 2, 4), places):
        yield Float8Tile(width, *shape, stages, split, blocks=blocks)


def _medium_tiles() -> Iterator[Float8Tile]:
    shapes = ((2, 1, 128, 5), (2, 1, 256, 4), (2, 1, 256, 3), (3, 1, 128, 4), (2, 2, 128, 3), (2, 1, 64, 6))
    for (warpgroups, tiles, width, stages), split, multicast in itertools.product(shapes, (1, 2), (1, 2)):
        yield Float8Tile(width, warpgroups, tiles, stages, split, multicast)


def _lasting_tiles() -> Iterator[Float8Tile]:
    shapes = ((2, 1, 128, 5), (2, 1, 256, 4), (3, 1, 128, 4), (2, 2, 128, 4))
    for (warpgroups, tiles, width, stages), multicast in itertools.product(shapes, (1, 2)):
        for group, lead in itertools.product((4, 8, 16), (0, 2, 3) if warpgroups == 2 else (0,)):
            tile = Float8Tile(width, warpgroups, tiles, stages, multicast=multicast, persistent=True)
            yield replace(tile, token_group=group, lead=lead)


def _num_blocks(tile: Float8Tile, problem: Problem) -> int:
    return -(-problem.out_features // tile.rows) * -(-problem.tokens // tile.tokens) * tile.split


def _fills(tile: Float8Tile, problem: Problem) -> bool:
    return 0.45 * _MULTIPROCESSORS <= _num_blocks(tile, problem) <= 2 * _MULTIPROCESSORS * tile.blocks


def calls(problem: Problem, tile: Float8Tile, count: int) -> Sequence[Callable[[], Tensor]]:
    has_blocks = problem.kind == SCALES_OF_BLOCKS
    rows, columns, tokens = problem.out_features, problem.in_features, problem.tokens
    torch.manual_seed(0)  # the same numbers for every tile, whose results are compared
    x = _codes(tokens, columns)
    row_scales = torch.rand(rows, device="cuda") + 0.5
    token_scales = torch.rand(tokens, device="cuda") + 0.5
    if has_blocks:
        row_scales = torch.rand(-(-rows // _BLOCK_ROWS), columns // STEP, device="cuda") + 0.5
        groups = torch.rand(columns // STEP, tokens, device="cuda") + 0.5
        token_scales = torch.nn.functional.pad(groups, (0, -tokens % tile.tokens))
    block_rows = _BLOCK_ROWS if has_blocks else None
    return [
        partial(float8_multiply, weight, row_scales, x, token_scales, tile, _DTYPE, block_rows=block_rows)
        for weight in _copies(rows, columns, max(2, count))
    ]


def _codes(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)


@lru_cache(maxsize=1)
def _copies(rows: int, columns: int, count: int) -> list[Tensor]:
    first = _codes(rows, columns)
    return [first, *(first.clone() for _ in range(count - 1))]


def sources(problem: Problem, tile: Float8Tile) -> list[tuple[str, dict[str, Macro]]]:
    return [(SOURCE, tile.macros(_DTYPE, _BLOCK_ROWS if problem.kind == SCALES_OF_BLOCKS else None))]


TUNABLES = (
    Tunable(
        name=TABLE,
        plan=Float8Tile,
        problems=problems,
        candidates=candidates,
        prepare=calls,
        weight_bytes=lambda problem: problem.out_features * problem.in_features,
        sources=sources,
    ),
)
