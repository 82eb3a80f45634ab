"""What scripts/tune_kernels tries for AQLM weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.kernels.benchmark.layer_shapes import layer_shapes
from aphroquant.kernels.cuda.aqlm import dequantize, gather, lookup, sliced
from aphroquant.kernels.cuda.aqlm.dequantize import DequantizePlan, dequantize_multiply
from aphroquant.kernels.cuda.aqlm.gather import GatherPlan, gather_multiply
from aphroquant.kernels.cuda.aqlm.lookup import LookupLinear, LookupPlan
from aphroquant.kernels.cuda.aqlm.packing import CodeLayout, PackedAdditive, pack_additive
from aphroquant.kernels.cuda.aqlm.plans import DEQUANTIZE, GATHER, LOOKUP, SLICED, kind_of, tiles_for
from aphroquant.kernels.cuda.aqlm.sliced import SlicedLinear, SlicedPlan
from aphroquant.kernels.cuda.aqlm.slices import MAX_CHUNK_GROUPS, SLICE_ENTRIES, WINDOW_ROWS
from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.tuning import Problem, Tunable
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import AdditiveScheme

_SCHEMES = {kind_of(scheme): scheme for scheme in (AdditiveScheme(2, 8), AdditiveScheme(1, 16))}
_KINDS_2X8, _KINDS_1X16 = ((kind,) for kind in _SCHEMES)
_MODELS, _MODEL = ("llama-3-8b", "llama-3-70b"), ("llama-3-8b",)
_GATHER_TOKENS, _DENSE_TOKENS = (1, 8, 16, 32, 64), (16, 32, 64, 256, 1024)
_DTYPE = torch.bfloat16
_WORKSPACES = (32, 512)  # MiB


class Copies(NamedTuple):
    """A weight several times over, so that no cache holds it."""

    packed: list[PackedAdditive]
    codes: Tensor


def _problems(kinds: Iterable[str], models: Iterable[str], tokens: Iterable[int]) -> Iterator[Problem]:
    models, tokens = tuple(models), tuple(tokens)
    for kind in kinds:
        for model in models:
            for shape in layer_shapes(model):
                for count in tokens:
                    yield Problem(kind, shape.out_features, shape.in_features, count)


@lru_cache(maxsize=1)
def _copies(kind: str, rows: int, columns: int, count: int) -> Copies:
    torch.manual_seed(0)  # the same numbers for every plan, whose results are compared
    weight = random_weight(_SCHEMES[kind], rows, columns, "cuda")
    packed = pack_additive(weight, _DTYPE, "cuda")
    more = [replace(packed, codes=packed.codes.clone()) for _ in range(max(2, count) - 1)]
    return Copies([packed, *more], weight["codes"])


@lru_cache(maxsize=1)
def _sliced_copies(kind: str, rows: int, columns: int, count: int) -> list[SlicedLinear]:
    copies = _copies(kind, rows, columns, 2)
    first = SlicedLinear(copies.packed[0], copies.codes, None)
    layers = [first]
    for _ in range(max(2, count) - 1):
        layer = copy.copy(first)
        layer.codes = replace(first.codes, quads=first.codes.quads.clone())
        layers.append(layer)
    return layers


def _of(problem: Problem, count: int) -> tuple[str, int, int, int]:
    return problem.kind, problem.out_features, problem.in_features, count


def _inputs(problem: Problem) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(problem.tokens, problem.in_features, device="cuda").to(_DTYPE)
    return x, x.new_empty(problem.tokens, problem.out_features)


def _giving(out: Tensor, run: Callable[[], None]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        run()
        return out

    return call


def _lookup_calls(problem: Problem, plan: LookupPlan, count: int) -> Sequence[Callable[[], Tensor]]:
    x, out = _inputs(problem)
    layers = [LookupLinear(packed, None, _DTYPE) for packed in _copies(*_of(problem, count)).packed]
    return [_giving(out, partial(layer, x, out, plan)) for layer in layers]


def _sliced_calls(problem: Problem, plan: SlicedPlan, count: int) -> Sequence[Callable[[], Tensor]]:
    x, out = _inputs(problem)
    return [_giving(out, partial(layer, x, out, plan)) for layer in _sliced_copies(*_of(problem, count))]


def _gather_calls(problem: Problem, plan: GatherPlan, count: int) -> Sequence[Callable[[], Tensor]]:
    x, out = _inputs(problem)
    tiles, grid = tiles_for(problem.tokens), _multiprocessors() * plan.blocks
    packed = _copies(*_of(problem, count)).packed
    return [_giving(out, partial(gather_multiply, own, x, None, out, tiles, plan, grid)) for own in packed]


def _dense_calls(problem: Problem, plan: DequantizePlan, count: int) -> Sequence[Callable[[], Tensor]]:
    x, out = _inputs(problem)
    packed = _copies(*_of(problem, count)).packed
    return [_giving(out, partial(dequantize_multiply, own, x, None, out, plan, _multiprocessors())) for own in packed]


def _lookup_plans(problem: Problem) -> list[LookupPlan]:
    scheme = _SCHEMES[problem.kind]
    slices = CodeLayout.of(scheme).slices(problem.in_features // scheme.in_group)
    one = max(1, _multiprocessors() // slices)
    return [LookupPlan(ranges, warps) for ranges in (one, 2 * one) for warps in (16, 24, 32)]


def _sliced_plans(problem: Problem) -> list[SlicedPlan]:
    scheme = _SCHEMES[problem.kind]
    chunks = -(-problem.in_features // scheme.in_group // MAX_CHUNK_GROUPS)
    units = scheme.num_codebooks * 2**scheme.code_bits // SLICE_ENTRIES * chunks
    windows = -(-problem.out_features // WINDOW_ROWS)
    ranges = {min(windows, max(1, turns * _multiprocessors() // units)) for turns in (1, 2)}
    return [SlicedPlan(count, warps) for count in sorted(ranges) for warps in (16, 24, 32)]


def _gather_plans(problem: Problem) -> list[GatherPlan]:
    tiles, copies = tiles_for(problem.tokens), 8 if _SCHEMES[problem.kind].code_bits <= 8 else 0
    if tiles >= 4:
        return [GatherPlan(8, blocks, copies) for blocks in ((1, 2) if tiles == 4 else (1,))]
    shapes = ((16, 1), (24, 1), (12, 2), (16, 2))
    plans = [GatherPlan(warps, blocks, copies) for warps, blocks in shapes]
    return plans if copies else [*plans, GatherPlan(16, 1, 0, 12288)]


def _dense_plans(problem: Problem) -> list[DequantizePlan]:
    return [DequantizePlan(workspace) for workspace in _WORKSPACES]


def _gather_sources(problem: Problem, plan: GatherPlan) -> list[tuple[str, dict[str, Macro]]]:
    return [(gather.SOURCE, plan.macros(_example(problem.kind), tiles_for(problem.tokens)))]


@lru_cache
def _example(kind: str) -> PackedAdditive:
    return pack_additive(random_weight(_SCHEMES[kind], 8, 8), _DTYPE, "cpu")


def _multiprocessors() -> int:
    return gpu(torch.cuda.current_device()).multiprocessors


def _code_bytes(problem: Problem) -> int:
    scheme = _SCHEMES[problem.kind]
    return problem.out_features * problem.in_features // scheme.in_group * scheme.num_codebooks * scheme.code_bits // 8


TUNABLES = (
    Tunable(
        LOOKUP,
        LookupPlan,
        lambda: _problems(_KINDS_2X8, _MODELS, (1,)),
        _lookup_plans,
        _lookup_calls,
        _code_bytes,
        lambda problem, plan: [(lookup.SOURCE, plan.macros(_DTYPE, _SCHEMES[problem.kind].num_codebooks))],
    ),
    Tunable(
        SLICED,
        SlicedPlan,
        lambda: _problems(_KINDS_1X16, _MODELS, (1,)),
        _sliced_plans,
        _sliced_calls,
        _code_bytes,
        lambda problem, plan: [(sliced.SOURCE, plan.macros(_DTYPE))],
    ),
    Tunable(
        GATHER,
        GatherPlan,
        lambda: _problems(_SCHEMES, _MODEL, _GATHER_TOKENS),
        _gather_plans,
        _gather_calls,
        _code_bytes,
        _gather_sources,
    ),
    Tunable(
        DEQUANTIZE,
        DequantizePlan,
        lambda: _problems(_SCHEMES, _MODEL, _DENSE_TOKENS),
        _dense_plans,
        _dense_calls,
        _code_bytes,
        lambda problem, plan: [(dequantize.SOURCE, dequantize.macros(_example(problem.kind)))],
    ),
)
