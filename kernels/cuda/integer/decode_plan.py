"""How the decode kernel cuts a layer into clusters, warps and stages, and what its source is compiled with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from aphroquant.kernels.cuda.integer.packing import CHUNK, ROWS, PackedInteger, chunk_bytes
from aphroquant.kernels.cuda.integer.problem import SCALE_TYPES, super_bytes
from aphroquant.kernels.cuda.lookup.tables import TABLE_BYTES, table_macro
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.schemes.lookup import TableName

TOKENS_OF_TILE = 8
_PARTIAL_PADDING = 4  # floats; see the kernel


@dataclass(frozen=True)
class DecodePlan:
    """How the kernel splits a layer. A block has warp_rows x warp_columns warps, `cluster` blocks share super rows."""

    cluster: int
    num_clusters: int
    warp_rows: int
    warp_columns: int
    stages: int
    unit_chunks: int = 2
    phases: int = 1
    blocks_per_multiprocessor: int = 2
    part_tiles: int = 4  # of 16 rows, that a warp works on: a super row, or half of one
    idle_clusters: int = 0
    early_stages: int | None = None  # loaded before the kernel waits for the one in front of it; None: all
    bulk_input: bool = False  # x comes by the bulk copy engine, where it comes as it is

    @property
    def num_warps(self) -> int:
        return self.warp_rows * self.warp_columns

    @property
    def part_rows(self) -> int:
        return self.part_tiles * 16

    @property
    def num_blocks(self) -> int:
        return (self.num_clusters + self.idle_clusters) * self.cluster


@dataclass(frozen=True)
class DecodeShape:
    """What the kernel's source depends on besides its plan."""

    bits: int
    group_size: int
    zero_kind: int  # 0 symmetric, 1 zero points, 2 offsets
    scale_dtype: torch.dtype
    out_features: int
    in_features: int
    padded_columns: int
    has_columns: bool
    has_bias: bool
    dtype: torch.dtype  # of x and y
    table: TableName | None = None
    super_bytes: int = 0  # of a super row, in a stage
    has_factor: bool = False

    @classmethod
    def of(cls, packed: PackedInteger, dtype: torch.dtype, has_bias: bool) -> DecodeShape:
        return cls(
            bits=packed.bits,
            group_size=packed.group_size,
            zero_kind=1 if packed.zeros is not None else 2 if packed.offsets is not None else 0,
            scale_dtype=packed.scales.dtype,
            out_features=packed.out_features,
            in_features=packed.in_features,
            padded_columns=packed.padded_columns,
            has_columns=packed.columns is not None,
            has_bias=has_bias,
            dtype=dtype,
            table=packed.table,
            super_bytes=super_bytes(packed),
            has_factor=packed.output_factor(dtype) != 1,
        )

    @property
    def super_rows(self) -> int:
        return ceil_div(self.out_features, ROWS)

    def passes(self, plan: DecodePlan) -> int:
        parts = self.super_rows * (ROWS // plan.part_rows)
        return ceil_div(ceil_div(parts, plan.num_clusters), plan.warp_rows)

    @property
    def row_scales(self) -> bool:
        return self.group_size == self.padded_columns and self.zero_kind == 0

    def takes_bulk_input(self, plan: DecodePlan) -> bool:
        """Whether the columns of x are those of the weight, all there at once."""
        return plan.bulk_input and plan.phases == 1 and not self.has_columns and self.in_features == self.padded_columns

    def stage_bytes(self, plan: DecodePlan) -> int:
        groups = max(1, plan.unit_chunks * CHUNK // self.group_size)
        size = self.scale_dtype.itemsize
        zero_bytes = (0, 1, size)[self.zero_kind]
        values = 0 if self.row_scales else size
        codes = plan.unit_chunks * chunk_bytes(self.bits) * plan.part_rows // ROWS
        return codes + groups * ROWS * (values + zero_bytes) + self.super_bytes

    @property
    def has_extras(self) -> bool:
        """Whether the kernel takes supers and a factor."""
        return self.super_bytes > 0 or self.has_factor

    @property
    def static_bytes(self) -> int:
        """Of shared memory, beside the layout's."""
        return 0 if self.table is None else TABLE_BYTES


@dataclass(frozen=True)
class SharedLayout:
    """Where the tokens begin in shared memory, and the bytes between them."""

    input_offset: int
    input_stride: int

    def num_bytes(self, num_tokens: int) -> int:
        return self.input_offset + num_tokens * self.input_stride


def shared_layout(shape: DecodeShape, plan: DecodePlan, token_tiles: int) -> SharedLayout:
    """As the kernel computes it, which checks these numbers."""
    units = shape.padded_columns // (plan.unit_chunks * CHUNK)
    max_units = ceil_div(units, plan.cluster * plan.warp_columns)
    passes = shape.passes(plan)
    tokens = token_tiles * TOKENS_OF_TILE
    ring = plan.num_warps * plan.stages * shape.stage_bytes(plan)
    partials = plan.num_warps * tokens * (plan.part_rows + _PARTIAL_PADDING) * 4
    if passes == 1 and partials <= ring:
        partials = 0
    received = tokens * plan.warp_rows * plan.part_rows * 4 * (2 if passes > 1 else 1) if plan.cluster > 1 else 0
    barriers = _up((plan.num_warps * plan.stages + 2 + plan.warp_columns) * 8, 128)
    segment = ceil_div(max_units, plan.phases) * plan.unit_chunks * CHUNK
    return SharedLayout(ring + partials + received + barriers, plan.warp_columns * segment * 2 + 16)


def decode_macros(shape: DecodeShape, plan: DecodePlan, token_tiles: int) -> dict[str, Macro]:
    """The macros of the kernel for up to 8 * token_tiles tokens."""
    layout = shared_layout(shape, plan, token_tiles)
    table: dict[str, Macro] = {} if shape.table is None else {"CODE_TABLE": table_macro(shape.table, shape.dtype)}
    extras: dict[str, Macro] = {"EXTRAS": 1} if shape.has_extras else {}
    return (table | extras) | {
        "CODE_BITS": shape.bits,
        "GROUP_SIZE": shape.group_size,
        "ZERO_KIND": shape.zero_kind,
        "BF16_INPUTS": int(shape.dtype == torch.bfloat16),
        "SCALE_TYPE": SCALE_TYPES[shape.scale_dtype],
        "OUT_FEATURES": shape.out_features,
        "IN_FEATURES": shape.in_features,
        "PADDED_COLUMNS": shape.padded_columns,
        "HAS_COLUMNS": int(shape.has_columns),
        "HAS_BIAS": int(shape.has_bias),
        "TOKEN_TILES": token_tiles,
        "NUM_CLUSTERS": plan.num_clusters,
        "CLUSTER": plan.cluster,
        "WARP_ROWS": plan.warp_rows,
        "WARP_COLUMNS": plan.warp_columns,
        "STAGES": plan.stages,
        "EARLY_STAGES": plan.early_stages or plan.stages,
        "UNIT_CHUNKS": plan.unit_chunks,
        "PHASES": plan.phases,
        "BULK_INPUT": int(shape.takes_bulk_input(plan)),
        "PART_TILES": plan.part_tiles,
        "BLOCKS_PER_MULTIPROCESSOR": plan.blocks_per_multiprocessor,
        "INPUT_OFFSET": layout.input_offset,
        "INPUT_STRIDE": layout.input_stride,
    }


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


_MAX_WARPS = 16
_MAX_STAGES = 8
_PHASES = (1, 2, 4, 8, 16, 32)
_REGISTERS = {1: 80, 2: 112, 3: 160, 4: 200}  # what the kernel needs at least, by token tiles
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_OTHER_SHARED_BYTES = 99 << 10
_RESERVED = 1 << 10  # by the system, for each block
_MULTIPROCESSOR_BYTES = 228 << 10  # of compute capability 9.0
_EARLY_BYTES = 64 << 10  # more, and x waits behind the weight


def choose_plan(shape: DecodeShape, tokens: int, multiprocessors: int, capability: tuple[int, int]) -> DecodePlan:
    """The plan with the least estimated time on a GPU for up to so many tokens."""
    plans = candidate_plans(shape, tokens, multiprocessors, capability)
    return min(plans, key=lambda plan: plan_cost(shape, plan, tokens, multiprocessors))


def candidate_plans(
    shape: DecodeShape, tokens: int, multiprocessors: int, capability: tuple[int, int]
) -> list[DecodePlan]:
    """Plans that fit the GPU, each with as many stages as shared memory holds.

    One block a multiprocessor: two, of which the second fills its rings while the first ends, measured no faster.
    Clusters of four and eight find no room on GPUs whose groups of multiprocessors differ in size.
    """
    found = []
    for cluster in (1, 2) if capability[0] >= 9 else (1,):
        for part_tiles, unit_chunks in ((4, 2), (4, 1), (2, 4), (2, 2), *(((4, 4),) if shape.bits < 4 else ())):
            if shape.padded_columns % (unit_chunks * CHUNK):
                continue
            parts = shape.super_rows * 4 // part_tiles
            turns = ceil_div(parts, max(1, multiprocessors // cluster))
            for warp_rows in range(1, min(turns, _MAX_WARPS) + 1):
                for warp_columns in range(1, _MAX_WARPS // warp_rows + 1):
                    plan = DecodePlan(
                        cluster=cluster,
                        num_clusters=ceil_div(parts, turns),
                        warp_rows=warp_rows,
                        warp_columns=warp_columns,
                        stages=2,
                        unit_chunks=unit_chunks,
                        blocks_per_multiprocessor=1,
                        part_tiles=part_tiles,
                    )
                    fitted = _fit(shape, tokens, plan, capability)
                    if fitted is not None:
                        found.append(fitted)
    return found


def plan_cost(shape: DecodeShape, plan: DecodePlan, tokens: int, multiprocessors: int) -> float:
    """Microseconds, roughly, as measured on an H100; only the order matters."""
    passes = shape.passes(plan)
    turns = ceil_div(shape.super_rows * ROWS // plan.part_rows, plan.num_clusters)
    units = ceil_div(shape.padded_columns // (plan.unit_chunks * CHUNK), plan.cluster * plan.warp_columns)
    stage_bytes = shape.stage_bytes(plan)
    block_bytes = turns * plan.warp_columns * units * stage_bytes
    streaming = block_bytes * multiprocessors / 2.7e6
    in_flight = plan.num_warps * plan.stages * stage_bytes
    starved = max(0.0, 1.0 - in_flight / 60_000) * 3.0
    few_warps = max(0, 16 - plan.num_warps) * 0.08
    reduction = 0.3 * (plan.cluster - 1) + (0.3 * (passes - 1) if plan.num_warps * plan.cluster > plan.warp_rows else 0)
    uneven = 0.03 * streaming * (passes * plan.warp_rows / turns - 1)
    small_parts = 0.005 * streaming * (4 - plan.part_tiles)
    late_inputs = max(0.0, plan.num_warps * (plan.early_stages or plan.stages) * stage_bytes / 40_000 - 1) * 0.5
    inputs = tokens * shape.padded_columns * 2 / plan.cluster / 40_000
    costs = (
        streaming,
        starved,
        few_warps,
        reduction,
        uneven,
        small_parts,
        late_inputs,
        inputs,
        1.0 * (plan.phases - 1),
    )
    return sum(costs)


def least_shared_bytes(plan: DecodePlan, capability: tuple[int, int]) -> int:
    """What a block asks for, so that no more than blocks_per_multiprocessor fit: a programmatic launch would else put
    blocks of one kernel side by side while other multiprocessors are idle."""
    if capability != (9, 0):
        return 0
    return _MULTIPROCESSOR_BYTES // (plan.blocks_per_multiprocessor + 1) - _RESERVED + 16


def fits(shape: DecodeShape, plan: DecodePlan, tokens: int, capability: tuple[int, int]) -> bool:
    """Whether a block has the shared memory."""
    layout = shared_layout(shape, plan, ceil_div(tokens, TOKENS_OF_TILE))
    return layout.num_bytes(tokens) <= _shared_limit(shape, capability)


def _shared_limit(shape: DecodeShape, capability: tuple[int, int]) -> int:
    return _SHARED_BYTES.get(capability, _OTHER_SHARED_BYTES) - shape.static_bytes


def _fit(shape: DecodeShape, tokens: int, plan: DecodePlan, capability: tuple[int, int]) -> DecodePlan | None:
    """The plan with the fewest phases that allow two stages, and as many stages as then fit; None if none do."""
    token_tiles = ceil_div(tokens, TOKENS_OF_TILE)
    if plan.blocks_per_multiprocessor * plan.num_warps * 32 * _REGISTERS[token_tiles] > 65536:
        return None
    limit = _shared_limit(shape, capability)
    units = shape.padded_columns // (plan.unit_chunks * CHUNK)
    most = min(_MAX_STAGES, max(2, shape.passes(plan) * ceil_div(units, plan.cluster * plan.warp_columns)))
    early = max(1, _EARLY_BYTES // (plan.num_warps * shape.stage_bytes(plan)))
    for phases in _PHASES:
        for stages in range(most, 1, -1):
            fitted = replace(plan, stages=stages, phases=phases, early_stages=min(early, stages))
            layout = shared_layout(shape, fitted, token_tiles)
            if layout.num_bytes(tokens) <= limit:
                return fitted
    return None
