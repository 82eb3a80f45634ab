"""What scripts/tune_kernels tries for the integer kernels."""

from __future__ import annotations

import copy
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
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile, wgmma_multiply
from aphroquant.kernels.cuda.lookup.kinds import schemes_by_kind
from aphroquant.kernels.cuda.lookup.linear import pack_any
from aphroquant.kernels.cuda.tuning import Problem, Tunable
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import IntegerScheme, Scheme

_MODELS = {4: ("llama-3-8b", "llama-3-70b", "qwen3-32b"), 8: ("llama-3-8b",)}
_DECODE_TOKENS = (1, 16)
_BATCH_TOKENS = (32, 64, 128, 256, 512, 1024, 4096)
_MOST_PLANS = 14  # those with the least estimated time
_DTYPE = torch.bfloat16
_SAMPLE = 256  # columns, of which the bytes of all follow
_SHARED_BYTES = 227 << 10
_MAX_STAGES = 8
_MAX_ACCUMULATORS = 256  # tokens times tiles: float32 registers of a warpgroup's thread, twice over


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


def _decode_shape(problem: Problem) -> DecodeShape:
    return DecodeShape.of(_packed_of(problem)[0], _DTYPE, has_bias=False)


def _decode_candidates(problem: Problem) -> list[DecodePlan]:
    found, shape = gpu(torch.cuda.current_device()), _decode_shape(problem)
    plans = candidate_plans(shape, problem.tokens, found.multiprocessors, found.capability)
    return sorted(plans, key=lambda plan: plan_cost(shape, plan, problem.tokens, found.multiprocessors))[:_MOST_PLANS]


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
    """Tiles of about the width of the batch, split so that the blocks fill the GPU about once, with many stages."""
    found, packed = gpu(torch.cuda.current_device()), _packed_of(problem)[0]
    if found.capability != (9, 0):
        return []
    widths = [width for width in (16, 32, 64, 128, 256) if problem.tokens / 4 <= width <= 2 * problem.tokens]
    if problem.tokens > 256:
        widths = [128, 256]
    tiles = []
    for width in widths:
        for persistent in (False, True) if problem.tokens > 128 else (False,):
            for warpgroups, rows in ((2, 1), (2, 2), (3, 1)):
                for chunks in (1, 2):
                    for split, multicast in ((1, 1), (1, 2), (2, 1), (4, 1), (8, 1)):
                        tile = WgmmaTile(
                            width, warpgroups, rows, chunks, split=split, multicast=multicast, persistent=persistent
                        )
                        if _is_sensible(problem, tile, found.multiprocessors):
                            tiles.append(tile)
    staged = [_with_most_stages(tile, packed) for tile in tiles]
    return [tile for tile in staged if tile is not None]


def _is_sensible(problem: Problem, tile: WgmmaTile, multiprocessors: int) -> bool:
    if tile.tokens * tile.tiles > _MAX_ACCUMULATORS:
        return False
    blocks = ceil_div(problem.out_features, tile.rows) * ceil_div(problem.tokens, tile.tokens)
    steps = problem.in_features // (64 * tile.chunks)
    if tile.split > 1:
        return not tile.persistent and blocks * tile.split <= 1.2 * multiprocessors and steps >= 4 * tile.split
    if tile.multicast > 1:
        return tile.persistent
    return not tile.persistent or blocks > multiprocessors


def _with_most_stages(tile: WgmmaTile, packed: PackedInteger) -> WgmmaTile | None:
    for stages in range(_MAX_STAGES, 1, -1):
        staged = replace(tile, stages=stages)
        if staged.shared_bytes(packed) <= _SHARED_BYTES:
            return staged
    return None


def _wgmma_calls(problem: Problem, tile: WgmmaTile, count: int) -> list[Callable[[], Tensor]]:
    x = _inputs(problem.tokens, problem.in_features)
    return [partial(wgmma_multiply, packed, x, None, tile) for packed in _packed_of(problem, count)]


def _wgmma_sources(problem: Problem, tile: WgmmaTile) -> list[tuple[str, dict[str, Macro]]]:
    return [(wgmma.SOURCE, tile.macros(_packed_of(problem)[0], _DTYPE))]


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
