"""Tokens sorted by expert, and back: kernels that need no number of tokens on the host, and so run in CUDA graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_int32, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.fused.elements import element_macro, vector_width
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.reference.grouped import TokenGroups, check_ids

TILE_SIZES = (8, 16, 32, 64, 128, 256)  # tokens of a tile; each twice the one before
MAX_EXPERTS = 512  # whose counts fit into shared memory
_TILE_FIELDS = 4  # expert, first place, end, line of scales: see grouped_tiles.cuh
_LINE = 4  # places of scales at a multiple of which an expert's begin
_WARPS = 32
_FEW_PAIRS = 2048  # that one block sorts about as fast as several do with a launch more
_PAIRS_OF_BLOCK = 1024
_MAX_BLOCKS = 32
_THREADS = 128


class GroupTiles(ctypes.Structure):
    """As in grouped_tiles.cuh."""

    _fields_ = (("tiles", c_void_p), ("count", c_void_p))


class _Route(ctypes.Structure):
    _fields_ = (
        ("pairs", c_int32),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("ids", c_void_p),
        ("places", c_void_p),
        ("rows", c_void_p),
        ("owners", c_void_p),
        ("lines", c_void_p),
        ("offsets", c_void_p),
        ("block_counts", c_void_p),
        ("counts", c_void_p),
        ("tiles", c_void_p * len(TILE_SIZES)),
    )


@dataclass
class Progress:
    """What has been launched with a list of tiles."""

    multiplied: bool = False  # a product has waited for the list: what is launched behind it need not


@dataclass(frozen=True)
class CudaTokenGroups(TokenGroups):
    """As TokenGroups, with what the kernels work through."""

    owners: Tensor  # int32 [T * k]: the expert of each place
    lines: Tensor  # int32 [T * k]: where its scale stands in a line of `line_length` scales
    counts: Tensor  # int32: how many tiles of each size there are
    tiles: tuple[Tensor, ...]  # int32 [most tiles, 4] of each size
    progress: Progress = field(default_factory=Progress)

    def tiles_of(self, size: int) -> GroupTiles:
        """The tiles of so many tokens."""
        index = TILE_SIZES.index(size)
        return GroupTiles(self.tiles[index].data_ptr(), self.counts.data_ptr() + 4 * index)

    def most_tiles(self, size: int) -> int:
        """So many tiles of that size there can be, whatever the experts are."""
        return most_tiles(self.num_pairs, self.num_experts, size)

    @property
    def num_places(self) -> Tensor:
        """int32 [1], on the GPU: the places in use."""
        return self.offsets[-1:]

    @property
    def line_length(self) -> int:
        """Places of a line of scales, with room for a whole tile at its end."""
        return line_length(self.num_pairs, self.num_experts)


def sorted_on_gpu(groups: TokenGroups, num_experts: int) -> CudaTokenGroups:
    """`groups` as the kernels need them. UsageError if they were made elsewhere, or for other experts."""
    if not isinstance(groups, CudaTokenGroups):
        raise UsageError("the groups of tokens were not sorted by group_tokens on a GPU")
    if groups.num_experts != num_experts:
        raise UsageError(f"the tokens are grouped for {groups.num_experts} experts, but the layer has {num_experts}")
    return groups


def most_tiles(num_pairs: int, num_experts: int, size: int) -> int:
    """The largest number of tiles that so many pairs can make."""
    return min(num_pairs, (num_pairs + min(num_experts, num_pairs) * (size - 1)) // size)


def num_blocks(num_pairs: int) -> int:
    """Blocks that sort so many pairs: a power of two, so that few kernels have to be compiled."""
    if num_pairs <= _FEW_PAIRS:
        return 1
    return min(_MAX_BLOCKS, 1 << (-(-num_pairs // _PAIRS_OF_BLOCK) - 1).bit_length())


def line_length(num_pairs: int, num_experts: int) -> int:
    """Places of a line of scales, whatever the experts are."""
    used = num_pairs + min(num_experts, num_pairs) * (_LINE - 1)
    return -(-used // _LINE) * _LINE + TILE_SIZES[-1]


def group_tokens(expert_ids: Tensor, num_experts: int) -> CudaTokenGroups:
    """expert_ids: int32 or int64 [T, k] on the GPU. One launch, or two for many pairs."""
    check_ids(expert_ids, num_experts)
    if num_experts > MAX_EXPERTS:
        raise UsageError(f"num_experts = {num_experts} must be at most {MAX_EXPERTS} for the CUDA kernels")
    ids = expert_ids.contiguous()
    pairs = ids.numel()
    sizes = [_TILE_FIELDS * most_tiles(pairs, num_experts, size) for size in TILE_SIZES]
    blocks = num_blocks(pairs)
    parts = _split(ids, [*sizes, pairs, pairs, pairs, pairs, num_experts + 1, blocks * num_experts, len(TILE_SIZES)])
    tiles = tuple(next(parts).view(-1, _TILE_FIELDS) for _ in TILE_SIZES)
    places, rows, owners, lines, offsets, block_counts, counts = parts
    groups = CudaTokenGroups(num_experts, rows, places.view(ids.shape), offsets, owners, lines, counts, tiles)
    addresses = [part.data_ptr() for part in (ids, places, rows, owners, lines, offsets, block_counts, counts)]
    route = _Route(
        pairs,
        num_experts,
        ids.shape[1],
        *addresses,
        (c_void_p * len(TILE_SIZES))(*[part.data_ptr() for part in tiles]),
    )
    macros = {
        "ID_BYTES": ids.element_size(),
        "NUM_SIZES": len(TILE_SIZES),
        "SMALLEST": TILE_SIZES[0],
        "WARPS": _WARPS,
        "BLOCKS": blocks,
    }
    sums = 2 + len(TILE_SIZES)
    if blocks > 1:
        cuda_kernel("grouped_route.cu", "grouped_count", macros).launch(
            grid=(blocks, 1, 1),
            block=(_WARPS * 32, 1, 1),
            args=[route],
            shared_bytes=4 * num_experts,
            programmatic=True,
        )
    cuda_kernel("grouped_route.cu", "grouped_route", macros).launch(
        grid=(blocks, 1, 1),
        block=(_WARPS * 32, 1, 1),
        args=[route],
        shared_bytes=4 * ((_WARPS + 1) * num_experts + sums * (num_experts + 1)),
        programmatic=True,
    )
    return groups


def _split(like: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """int32 tensors of these sizes in one piece of memory, each at a multiple of 16 bytes."""
    padded = [-(-size // 4) * 4 for size in sizes]
    memory = torch.empty(sum(padded), dtype=torch.int32, device=like.device)
    start = 0
    for size, step in zip(sizes, padded, strict=True):
        yield memory[start : start + size]
        start += step


def combine(y: Tensor, groups: TokenGroups, weights: Tensor) -> Tensor:
    """y [T * k, N] in the order of places, weights [T, k] -> [T, N]: weighted sums in float32, in y's dtype."""
    tokens, top_k = groups.places.shape
    columns = y.shape[1]
    out = y.new_empty(tokens, columns)
    if not out.numel():
        return out
    width = vector_width(columns)
    macros = element_macro(y.dtype) | {"TOP_K": top_k, "VECTOR": width, "THREADS": _THREADS}
    cuda_kernel("grouped_combine.cu", "grouped_combine", macros).launch(
        grid=(tokens, -(-columns // (_THREADS * width)), 1),
        block=(_THREADS, 1, 1),
        args=[y, groups.places, weights.float().contiguous(), out, c_int32(columns)],
        programmatic=True,
    )
    return out
