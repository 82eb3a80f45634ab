"""Plans and tiles of the integer kernels from the measured tables (kernels/cuda/tables)."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.decode_plan import DecodePlan, DecodeShape, candidate_plans
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.tuning import Problem, tuned, tuned_entry

DECODE, WGMMA = "integer_decode", "integer_wgmma"


def kind_of(bits: int) -> str:
    """What of a weight a plan depends on: groups and zero points cost the same in any plan."""
    return f"bits={bits}"


def measured_plan(shape: DecodeShape, tokens: int, device: int) -> DecodePlan | None:
    """The measured plan of this layer; else, of the plans that fit it, the one that splits it as the nearest one's."""
    problem = Problem(kind_of(shape.bits), shape.out_features, shape.in_features, tokens)
    entry = tuned_entry(DECODE, problem, device)
    if entry is None:
        return None
    measured = DecodePlan(**entry.plan)  # type: ignore[arg-type]  # a plan's numbers as JSON has them
    if entry.problem == problem and _is_as_measured(shape):
        return measured
    found = gpu(device)
    plans = candidate_plans(shape, tokens, found.multiprocessors, found.capability)
    return next((plan for plan in plans if _split(plan) == _split(measured)), None)


def measured_tile(packed: PackedInteger, tokens: int, device: int, max_shared_bytes: int) -> WgmmaTile | None:
    """The measured tile of the nearest product, if this weight's fits into shared memory."""
    problem = Problem(kind_of(packed.bits), packed.out_features, packed.in_features, tokens)
    tile = tuned(WGMMA, WgmmaTile, problem, device)
    fits = tile is not None and tile.shared_bytes(packed) + packed.static_bytes <= max_shared_bytes
    return tile if fits else None


def _is_as_measured(shape: DecodeShape) -> bool:
    """Whether it needs no more shared memory than those that were measured: symmetric groups of 128, 16-bit scales."""
    usual = (shape.group_size, shape.zero_kind, shape.static_bytes) == (128, 0, 0)
    return usual and shape.scale_dtype != torch.float32


def _split(plan: DecodePlan) -> tuple[int, ...]:
    """What of a plan carries over to a layer of another size."""
    warps = (plan.warp_rows, plan.warp_columns)
    return plan.cluster, *warps, plan.blocks_per_multiprocessor, plan.part_tiles, plan.unit_chunks
