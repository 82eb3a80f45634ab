"""Plans and tiles of the integer kernels from the measured tables (kernels/cuda/tables)."""

from __future__ import annotations

from dataclasses import replace

import torch

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan, DecodeShape, candidate_plans, fits
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.tuning import Problem, tuned, tuned_entry

DECODE, WGMMA = "integer_decode", "integer_wgmma"
LOOKUP_DECODE, LOOKUP_WGMMA = "lookup_decode", "lookup_wgmma"  # of weights with tables and of super-blocks
_LARGE_GROUP = 64  # larger ones cost the same


def kind_of(bits: int) -> str:
    """What of a weight a plan depends on: groups and zero points cost the same in any plan."""
    return f"bits={bits}"


def kind_of_lookup(weight: PackedInteger | DecodeShape) -> str | None:
    """The same for weights with a table, whatever it holds, and for super-blocks; None for integers."""
    if weight.table is not None:
        return f"table group={min(weight.group_size, _LARGE_GROUP)}"
    return f"super bits={weight.bits} group={weight.group_size}" if weight.scale_dtype == torch.int8 else None


def measured_plan(shape: DecodeShape, tokens: int, device: int) -> DecodePlan | None:
    """The measured plan of this layer; else, of the plans that fit it, the one that splits it as the nearest one's."""
    lookup = kind_of_lookup(shape)
    problem = Problem(lookup or kind_of(shape.bits), shape.out_features, shape.in_features, tokens)
    entry = tuned_entry(LOOKUP_DECODE if lookup else DECODE, problem, device)
    entry = entry or tuned_entry(DECODE, replace(problem, kind=kind_of(shape.bits)), device)
    if entry is None:
        return None
    measured, found = DecodePlan(**entry.plan), gpu(device)  # type: ignore[arg-type]  # numbers as JSON has them
    same = fits(shape, measured, tokens, found.capability) if lookup else _is_as_measured(shape)
    if entry.problem == problem and same:
        return measured
    plans = candidate_plans(shape, tokens, found.multiprocessors, found.capability)
    return next((plan for plan in plans if _split(plan) == _split(measured)), None)


def measured_tile(packed: PackedInteger, tokens: int, device: int, max_shared_bytes: int) -> WgmmaTile | None:
    """The measured tile of the nearest product, if this weight's fits into shared memory."""
    lookup = kind_of_lookup(packed)
    problem = Problem(lookup or kind_of(packed.bits), packed.out_features, packed.in_features, tokens)
    tile = tuned(LOOKUP_WGMMA if lookup else WGMMA, WgmmaTile, problem, device)
    if tile is None or tile.shared_bytes(packed) + packed.static_bytes > max_shared_bytes:
        return None
    return tile


def _is_as_measured(shape: DecodeShape) -> bool:
    """Whether it needs no more shared memory than those that were measured: symmetric groups of 128, 16-bit scales."""
    usual = (shape.group_size, shape.zero_kind, shape.static_bytes) == (128, 0, 0)
    return usual and shape.scale_dtype != torch.float32


def _split(plan: DecodePlan) -> tuple[int, ...]:
    """What of a plan carries over to a layer of another size."""
    warps = (plan.warp_rows, plan.warp_columns)
    return plan.cluster, *warps, plan.blocks_per_multiprocessor, plan.part_tiles, plan.unit_chunks
