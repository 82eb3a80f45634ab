"""What scripts/tune_kernels tries for the integer kernels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.layer_shapes import layer_shapes
from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer import decode, wgmma
from aphroquant.kernels.cuda.integer.decode import DecodeLinear
from aphroquant.kernels.cuda.integer.decode_plan import (
    TOKENS_OF_TILE,
    DecodePlan,
    DecodeShape,
    candidate_plans,
    ceil_div,
    decode_macros,
    plan_cost,
)
from aphroquant.kernels.cuda.integer.measured import DECODE, WGMMA, kind_of
from aphroquant.kernels.cuda.integer.packing import CHUNK, COLUMNS, ROWS, PackedInteger, pack
from aphroquant.kernels.cuda.integer.row_parts import Part, multiply_parts, row_parts
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.lookup.kinds import schemes_by_kind
from aphroquant.kernels.cuda.lookup.linear import pack_any
from aphroquant.kernels.cuda.tuning import Problem, Tunable
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import IntegerScheme, Scheme

_MODELS = {4: ("llama-3-8b", "llama-3-70b", "qwen3-32b"), 2: ("llama-3-8b",), 3: ("llama-3-8b",), 8: ("llama-3-8b",)}
_DECODE_TOKENS = (1, 8, 16)
_BATCH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096)
_MOST_PLANS = 8  # those with the least estimated time
_DTYPE = torch.bfloat16
_SAMPLE = 256  # columns, of which the bytes of all follow
_FEW_TOKENS = 8  # up to them, x may come by the bulk copy engine
_SHARED_BYTES = 227 << 10
_RESERVED_BYTES = 1 << 10  # for each block
_REGISTERS = 1 << 16  # of a multiprocessor
_MAX_STAGES, _FEW_STAGES = 8, 4
_FEW, _BATCH = 64, 256  # tokens


def _problems(tokens: Sequence[int]) -> Iterator[Problem]:
    for bits, models in _MODELS.items():
        for model in models:
            for shape in layer_shapes(model):
                for count in tokens:
                    yield Problem(kind_of(bits), shape.out_features, shape.in_features, count)


def _bits(problem: Problem) -> int:
    return int(problem.kind.removeprefix("bits="))


def _scheme(problem: Problem) -> Scheme:
    """Of integers, or as lookup/tuning.py has it."""
    return schemes_by_kind().get(problem.kind) or IntegerScheme(_bits(problem), 128, symmetric=True)


@lru_cache(maxsize=1)
def _copies(kind: str, out_features: int, in_features: int, count: int) -> list[PackedInteger]:
    """Packed once, for all plans of a layer."""
    scheme = _scheme(Problem(kind, out_features, in_features, 1))
    weight = random_weight(scheme, out_features, in_features, "cuda")
    first = pack(weight, "cuda") if isinstance(scheme, IntegerScheme) else pack_any(weight, "cuda")
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


@lru_cache(maxsize=4)
def _inputs(tokens: int, in_features: int) -> Tensor:
    return torch.randn(tokens, in_features, device="cuda").to(_DTYPE)


def _weight_bytes(problem: Problem) -> int:
    return random_weight(_scheme(problem), problem.out_features, _SAMPLE).num_bits // 8 * problem.in_features // _SAMPLE


def _packed_of(problem: Problem, count: int = 1) -> list[PackedInteger]:
    return _copies(problem.kind, problem.out_features, problem.in_features, max(2, count))


def _token_tiles(problem: Problem) -> int:
    return ceil_div(problem.tokens, TOKENS_OF_TILE)


@lru_cache(maxsize=64)
def _sample(kind: str) -> PackedInteger:
    """A small weight, for what does not depend on the size."""
    scheme = _scheme(Problem(kind, ROWS, _SAMPLE, 1))
    weight = random_weight(scheme, ROWS, _SAMPLE)
    return pack(weight, "cpu") if isinstance(scheme, IntegerScheme) else pack_any(weight, "cpu")


def _decode_shape(problem: Problem) -> DecodeShape:
    shape, size = DecodeShape.of(_sample(problem.kind), _DTYPE, has_bias=False), problem.in_features
    padded = ceil_div(size, COLUMNS) * COLUMNS
    return replace(shape, out_features=problem.out_features, in_features=size, padded_columns=padded)


def _decode_candidates(problem: Problem) -> list[DecodePlan]:
    found, shape = gpu(torch.cuda.current_device()), _decode_shape(problem)
    plans = candidate_plans(shape, problem.tokens, found.multiprocessors, found.capability)
    best = sorted(plans, key=lambda plan: plan_cost(shape, plan, problem.tokens, found.multiprocessors))[:_MOST_PLANS]
    if problem.tokens > _FEW_TOKENS or found.capability < (9, 0):
        return best
    bulk = [replace(plan, bulk_input=True) for plan in best]
    return best + [plan for plan in bulk if shape.takes_bulk_input(plan)]


def _decode_calls(problem: Problem, plan: DecodePlan, count: int) -> list[Callable[[], Tensor]]:
    x = _inputs(problem.tokens, problem.in_features)
    out = x.new_empty(problem.tokens, problem.out_features)

    def run(layer: DecodeLinear) -> Tensor:
        layer(x, out)
        return out

    layers = [DecodeLinear(packed, None, _DTYPE, lambda shape, tiles: plan) for packed in _packed_of(problem, count)]
    return [partial(run, layer) for layer in layers]


def _decode_sources(problem: Problem, plan: DecodePlan) -> list[tuple[str, dict[str, Macro]]]:
    return [(decode.SOURCE, decode_macros(_decode_shape(problem), plan, _token_tiles(problem)))]


def _wgmma_candidates(problem: Problem) -> list[WgmmaTile]:
    """Tiles of about the width of the batch that fill the GPU once, or are taken one after another."""
    found, packed = gpu(torch.cuda.current_device()), _sample(problem.kind)
    if found.capability != (9, 0):
        return []
    if problem.tokens <= _FEW:
        tiles = _narrow_tiles(problem, found.multiprocessors)
    elif problem.tokens <= _BATCH:
        tiles = _medium_tiles(problem, found.multiprocessors)
    else:
        tiles = _wide_tiles(problem)
    staged = [_with_most_stages(tile, packed, problem) for tile in tiles]
    found_tiles = [tile for tile in staged if tile is not None]
    if problem.tokens <= _FEW:  # a stage that is asked for early keeps the inputs waiting
        found_tiles += [replace(tile, stages=_FEW_STAGES) for tile in found_tiles if tile.stages > _FEW_STAGES]
    return list(dict.fromkeys(found_tiles))


def _narrow_tiles(problem: Problem, multiprocessors: int) -> Iterator[WgmmaTile]:
    """One tile of tokens; two or three blocks side by side, or one with all the shared memory."""
    width = next(width for width in (16, 32, 64) if problem.tokens <= width)
    shapes = ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2))
    for (warpgroups, tiles), split, blocks in itertools.product(shapes, (1, 2, 4, 8), (1, 2, 3)):
        tile = WgmmaTile(width, warpgroups, tiles, split=split, blocks=blocks, steps=2)
        least, most = (0.7, 1.0) if blocks == 1 else (1.2, min(2.0, blocks))
        rounds = _num_blocks(problem, tile) / multiprocessors
        fills = least <= rounds <= most or (rounds > most and split == 1 and tile.rows > 2 * ROWS)
        if fills and _has_registers(tile):
            yield tile


def _medium_tiles(problem: Problem, multiprocessors: int) -> Iterator[WgmmaTile]:
    for width, (warpgroups, tiles), split in itertools.product((64, 128), ((2, 1), (3, 1), (2, 2)), (1, 2)):
        tile = WgmmaTile(width, warpgroups, tiles, split=split, steps=2 if width == _FEW else 1)
        if 0.45 * multiprocessors <= _num_blocks(problem, tile) <= multiprocessors:
            yield tile
    for tile in (WgmmaTile(problem.tokens, chunks=1), WgmmaTile(128, tiles=2, chunks=1)):
        if _num_blocks(problem, tile) > multiprocessors:
            yield from (replace(tile, persistent=True, cut=cut) for cut in (False, True))


def _wide_tiles(problem: Problem) -> Iterator[WgmmaTile]:
    for width, warpgroups, multicast in ((256, 2, 1), (256, 2, 2), (128, 3, 1), (128, 3, 2)):
        tile = WgmmaTile(width, warpgroups, chunks=1, multicast=multicast, persistent=True)
        leads = (0, 2, 4) if warpgroups == 2 else (0,)
        groups = (4, 16) if problem.tokens > 4 * width else (4,)
        for lead, group in itertools.product(leads, groups):
            yield replace(tile, lead=lead, token_group=group)
        yield replace(tile, cut=True)
    if problem.tokens == 2 * _BATCH:
        yield from (WgmmaTile(128, 2), WgmmaTile(128, 3), WgmmaTile(128, 2, 2, split=2))


def _has_registers(tile: WgmmaTile) -> bool:
    """For the sums of a tile and of a group, and some more."""
    return (tile.warpgroups + 1) * 128 * tile.blocks * (tile.tokens * tile.tiles + 32) <= _REGISTERS


def _num_blocks(problem: Problem, tile: WgmmaTile) -> int:
    return ceil_div(problem.out_features, tile.rows) * ceil_div(problem.tokens, tile.tokens) * tile.split


def _with_most_stages(tile: WgmmaTile, packed: PackedInteger, problem: Problem) -> WgmmaTile | None:
    """As many as fit and a part of the columns has."""
    limit = _SHARED_BYTES // tile.blocks - (_RESERVED_BYTES if tile.blocks > 1 else 0) - packed.static_bytes
    steps = problem.in_features // (CHUNK * tile.chunks * tile.split)
    for stages in range(min(_MAX_STAGES, steps), 1, -1):
        staged = replace(tile, stages=stages)
        if staged.shared_bytes(packed) <= limit:
            return staged
    return None


def _wgmma_calls(problem: Problem, tile: WgmmaTile, count: int) -> list[Callable[[], Tensor]]:
    x = _inputs(problem.tokens, problem.in_features)
    parts = _parts(problem, tile)
    return [partial(multiply_parts, packed, x, None, parts) for packed in _packed_of(problem, count)]


def _wgmma_sources(problem: Problem, tile: WgmmaTile) -> list[tuple[str, dict[str, Macro]]]:
    return [(wgmma.SOURCE, own.macros(_sample(problem.kind), _DTYPE)) for _, own in _parts(problem, tile)]


def _parts(problem: Problem, tile: WgmmaTile) -> list[Part]:
    multiprocessors = gpu(torch.cuda.current_device()).multiprocessors
    columns = ceil_div(problem.in_features, COLUMNS) * COLUMNS
    return row_parts(problem.out_features, columns, problem.tokens, tile, multiprocessors)


TUNABLES = (
    Tunable(
        name=DECODE,
        plan=DecodePlan,
        problems=lambda: _problems(_DECODE_TOKENS),
        candidates=_decode_candidates,
        prepare=_decode_calls,
        weight_bytes=_weight_bytes,
        sources=_decode_sources,
    ),
    Tunable(
        name=WGMMA,
        plan=WgmmaTile,
        problems=lambda: _problems(_BATCH_TOKENS),
        candidates=_wgmma_candidates,
        prepare=_wgmma_calls,
        weight_bytes=_weight_bytes,
        sources=_wgmma_sources,
    ),
)
