"""How grouped products are cut: by the number of pairs that an expert gets on average, which is all the host knows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aphroquant.kernels.cuda.float8.tiles import fits as float8_fits
from aphroquant.kernels.cuda.float8.wgmma import Float8Tile
from aphroquant.kernels.cuda.integer.decode_plan import (
    TOKENS_OF_TILE,
    DecodePlan,
    DecodeShape,
    ceil_div,
    shared_layout,
)
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.tiles import fits
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile

DECODE_SIZES = (8, 16)  # tokens of a tile of the decode kernel
WGMMA_SIZES = (16, 32, 64, 128)  # more waste more than they gain: most experts fill no tile of 256
MMA_SIZES = (16, 32, 64)
_WARPS = 4  # of a block: few, so that several blocks hide each other's beginnings and ends
_MOST_WARPS = 12  # of a block that has a multiprocessor to itself
_BLOCKS = (3, 2, 1)  # of a multiprocessor
_MAX_STAGES = 8
_PHASES = (1, 2, 4, 8, 16, 32)
_REGISTERS = {1: 84, 2: 136, 4: 204}  # of a thread, by tiles of 8 tokens
_FEW = 5.0  # pairs an expert, up to which reading the weights is all that takes time
_RESERVED = 1 << 10  # bytes of shared memory of each block


@dataclass(frozen=True)
class Load:
    """How many pairs there are, for how many experts."""

    pairs: int
    experts: int

    @property
    def of_expert(self) -> float:
        """Pairs of an expert that has any, about."""
        return self.pairs / min(self.experts, max(1, self.pairs))

    def size(self, sizes: tuple[int, ...]) -> int:
        """Tokens of a tile: so that most experts need one, even if some get more than the average."""
        wanted = self.of_expert * 1.25 + (2 if self.of_expert > 1 else 0)
        return next((size for size in sizes if wanted <= size), sizes[-1])

    @property
    def few(self) -> bool:
        return self.of_expert <= _FEW

    def few_blocks(self, super_rows: int, multiprocessors: int) -> bool:
        """Whether the super rows of all experts with tokens fit the GPU at once."""
        return min(self.pairs, self.experts) * super_rows <= multiprocessors


def decode_plan(shape: DecodeShape, size: int, shared_bytes: int, few_blocks: bool = False) -> DecodePlan:
    """A block for every super row of every tile; its warps share the columns.

    `shared_bytes`: of a multiprocessor. `few_blocks`: so few that each has one to itself.
    """
    warps = min(_MOST_WARPS if few_blocks else _WARPS, shape.padded_columns // (2 * CHUNK))
    for blocks in (1,) if few_blocks else _BLOCKS:
        if blocks > 1 and blocks * warps * 32 * _REGISTERS[size // TOKENS_OF_TILE] > 65536:
            continue
        plan = DecodePlan(1, shape.super_rows, 1, warps, 2, blocks_per_multiprocessor=blocks)
        if fitted := fit(shape, size, plan, shared_bytes // blocks - _RESERVED, 2 if blocks > 1 else _PHASES[-1]):
            return fitted
    raise AssertionError(f"no plan for {shape}")


def fit(shape: DecodeShape, size: int, plan: DecodePlan, limit: int, most_phases: int) -> DecodePlan | None:
    """With as few phases and as many stages as the shared memory of a block allows; None if two are too many."""
    units = ceil_div(shape.padded_columns // (plan.unit_chunks * CHUNK), plan.warp_columns * plan.cluster)
    most = min(_MAX_STAGES, max(2, shape.passes(plan) * units))
    for phases in _PHASES:
        for stages in range(most, 1, -1):
            fitted = replace(plan, stages=stages, phases=phases, early_stages=stages)
            if phases <= most_phases and shared_layout(shape, fitted, size // TOKENS_OF_TILE).num_bytes(size) <= limit:
                return fitted
    return None


def wgmma_tile(packed: PackedInteger, load: Load) -> WgmmaTile:
    """Tiles are many: no block shares one with another. As measured for Qwen3-30B-A3B, Mixtral 8x7B and gpt-oss-20b."""
    size = load.size(WGMMA_SIZES)
    if size < 128:
        tiles = [WgmmaTile(size, stages=stages, blocks=2, persistent=True) for stages in (6, 5, 4, 3, 2)]
    else:
        tiles = [WgmmaTile(size, tiles=2, chunks=1, stages=stages, persistent=True) for stages in (6, 5, 4, 3, 2)]
    tiles += [WgmmaTile(size, chunks=1, stages=stages, persistent=True) for stages in (4, 3, 2)]
    return next(tile for tile in tiles if fits(tile, packed))


def mma_tile(load: Load) -> MmaTile:
    return MmaTile(load.size(MMA_SIZES), stages=4)


def float8_tile(columns: int, load: Load, has_blocks: bool) -> Float8Tile:
    size = load.size(WGMMA_SIZES)
    tiles = [Float8Tile(size, stages=stages, persistent=True) for stages in range(8, 1, -1)]
    return next(tile for tile in tiles if float8_fits(tile, columns, has_blocks))
