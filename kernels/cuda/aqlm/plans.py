"""Which kernel multiplies how many tokens, and with which settings: from measured tables, or by estimate."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from aphroquant.kernels.cuda.aqlm.dequantize import DequantizePlan, copies_within
from aphroquant.kernels.cuda.aqlm.gather import TOKENS_OF_TILE, GatherPlan
from aphroquant.kernels.cuda.aqlm.lookup import LookupPlan
from aphroquant.kernels.cuda.aqlm.sliced import SlicedPlan
from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.tuning import Problem, tuned, tuned_entry
from aphroquant.schemes import AdditiveScheme

LOOKUP, SLICED, GATHER, DEQUANTIZE = "aqlm_lookup", "aqlm_sliced", "aqlm_gather", "aqlm_dequantize"  # tables
TOKEN_TILES = (1, 2, 4, 8)  # a gather kernel is made for each, and serves fewer
MAX_GATHERED = TOKEN_TILES[-1] * TOKENS_OF_TILE
_ESTIMATED_CROSSOVER = 32  # tokens, where nothing was measured
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
_LEAST_SHARED = 99 << 10  # of a block, on every GPU that the kernels run on


class Layer(NamedTuple):
    """What of a layer a plan depends on."""

    scheme: AdditiveScheme
    out_features: int
    in_features: int
    device: int

    def problem(self, tokens: int) -> Problem:
        return Problem(kind_of(self.scheme), self.out_features, self.in_features, tokens)


def kind_of(scheme: AdditiveScheme) -> str:
    """ "2x8 g8"."""
    return f"{scheme.num_codebooks}x{scheme.code_bits} g{scheme.in_group}"


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block can have."""
    return _SHARED_BYTES.get(capability, _LEAST_SHARED)


@lru_cache(maxsize=8192)  # asked for at every call
def lookup_plan(layer: Layer, slices: int) -> LookupPlan:
    """As measured; of a layer of another size the warps, and one block on each multiprocessor."""
    plan = tuned(LOOKUP, LookupPlan, layer.problem(1), layer.device) or LookupPlan()
    return plan if _is_measured(LOOKUP, layer) else replace(plan, ranges=_ranges(layer, slices))


@lru_cache(maxsize=8192)
def sliced_plan(layer: Layer, units: int) -> SlicedPlan:
    """As `lookup_plan`."""
    plan = tuned(SLICED, SlicedPlan, layer.problem(1), layer.device) or SlicedPlan()
    return plan if _is_measured(SLICED, layer) else replace(plan, ranges=_ranges(layer, units))


def _is_measured(table: str, layer: Layer) -> bool:
    entry = tuned_entry(table, layer.problem(1), layer.device)
    return entry is not None and _size(entry.problem) == (layer.out_features, layer.in_features)


def _ranges(layer: Layer, blocks: int) -> int:
    """So many that ranges of `blocks` blocks fill the GPU once."""
    return max(1, gpu(layer.device).multiprocessors // blocks)


@lru_cache(maxsize=8192)
def runs_one_by_one(layer: Layer, tokens: int, table: str) -> bool:
    """Whether so many launches of the kernel for one token are faster than gathering for all of them at once."""
    if tokens >= TOKENS_OF_TILE:
        return False
    one = tuned_entry(table, layer.problem(1), layer.device)
    gathered = tuned_entry(GATHER, layer.problem(gathered_as(tokens)), layer.device)
    if one is None or gathered is None or _size(one.problem) != _size(gathered.problem):
        return tokens == 1
    return tokens * one.microseconds < gathered.microseconds


def _size(problem: Problem) -> tuple[int, int]:
    return problem.out_features, problem.in_features


@lru_cache(maxsize=8192)
def gather_plan(layer: Layer, tokens: int) -> GatherPlan:
    """As measured, where the codebooks fit as the plan wants them."""
    limit = shared_limit(gpu(layer.device).capability)
    plan = tuned(GATHER, GatherPlan, layer.problem(gathered_as(tokens)), layer.device)
    if plan is not None and plan.shared_bytes(layer.scheme) <= limit // plan.blocks - 1024:
        return plan
    return estimate_gather(layer.scheme, tiles_for(tokens), limit)


def estimate_gather(scheme: AdditiveScheme, token_tiles: int, shared_bytes: int) -> GatherPlan:
    """Copies of small codebooks in shared memory, large ones in L2."""
    warps = 8 if token_tiles >= 4 else 16
    room = shared_bytes - 1024 - GatherPlan(warps, copies=0).shared_bytes(scheme)
    copies = copies_within(scheme, min(room, 128 << 10))
    blocks = 1 if copies or token_tiles > 4 or scheme.in_group > 8 else 2
    return GatherPlan(warps, blocks, copies)


@lru_cache(maxsize=8192)
def dequantize_plan(layer: Layer, tokens: int) -> DequantizePlan:
    return tuned(DEQUANTIZE, DequantizePlan, layer.problem(tokens), layer.device) or DequantizePlan()


@lru_cache(maxsize=8192)
def gathers(layer: Layer, tokens: int) -> bool:
    """Whether gathering is faster than dequantizing, judged by the nearest products that were measured with both."""
    if tokens > MAX_GATHERED:
        return False
    gathered = tuned_entry(GATHER, layer.problem(gathered_as(tokens)), layer.device)
    dense = tuned_entry(DEQUANTIZE, layer.problem(tokens), layer.device)
    if gathered is None or dense is None or _size(gathered.problem) != _size(dense.problem):
        return tokens <= _ESTIMATED_CROSSOVER
    return gathered.microseconds < dense.microseconds


def gathered_as(tokens: int) -> int:
    """The number of tokens whose plan gathers for so many: one, or whole tiles."""
    return 1 if tokens == 1 else tiles_for(tokens) * TOKENS_OF_TILE


def tiles_for(tokens: int) -> int:
    return next(tiles for tiles in TOKEN_TILES if tokens <= tiles * TOKENS_OF_TILE)
