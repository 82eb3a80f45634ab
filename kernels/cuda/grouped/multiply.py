"""Launches of the dense kernels with the macro GROUPED: one grid for the tiles of all experts."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.float8 import wgmma as float8
from aphroquant.kernels.cuda.float8.wgmma import STEP, Float8Tile
from aphroquant.kernels.cuda.grouped.routing import CudaTokenGroups, GroupTiles
from aphroquant.kernels.cuda.integer import decode, mma, wgmma
from aphroquant.kernels.cuda.integer.decode_plan import (
    TOKENS_OF_TILE,
    DecodePlan,
    DecodeShape,
    decode_macros,
    shared_layout,
)
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.problem import PackedWeights
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

GROUPED: dict[str, Macro] = {"GROUPED": 1}
_MMA_THREADS = 128


class _Extent(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("steps", c_int32),
        ("row_tiles", c_int32),
        ("token_tiles", c_int32),
        ("first_row_tile", c_int32),
        ("groups", GroupTiles),
    )


class _WgmmaProblem(ctypes.Structure):
    _fields_ = (("extent", _Extent), ("weights", PackedWeights), ("values", c_void_p), ("bias", c_void_p))


class _Float8Problem(ctypes.Structure):
    _fields_ = (
        ("extent", _Extent),
        ("token_stride", c_int32),
        ("row_stride", c_int32),
        ("padded_tokens", c_int32),
        ("scale_columns", c_int32),
        ("token_scales", c_void_p),
        ("row_scales", c_void_p),
        ("values", c_void_p),
        ("bias", c_void_p),
    )


class _MmaProblem(mma.Problem):
    _fields_ = (("groups", GroupTiles),)


def decode_multiply(
    packed: PackedInteger,
    x: Tensor,
    groups: CudaTokenGroups,
    bias: Tensor | None,
    plan: DecodePlan,
    size: int,
    out: Tensor,
    in_order: bool = False,
) -> None:
    """The decode kernel on tiles of `size` tokens. x: contiguous [T, K], or with `in_order` [T * k, K]."""
    shape, token_tiles = DecodeShape.of(packed, x.dtype, bias is not None), size // TOKENS_OF_TILE
    layout = shared_layout(shape, plan, token_tiles)
    cuda_kernel(decode.SOURCE, decode.ENTRY, decode_macros(shape, plan, token_tiles) | _macros(groups)).launch(
        grid=(plan.num_blocks, groups.most_tiles(size), 1),
        block=(plan.num_warps * 32, 1, 1),
        args=[
            packed.codes,
            packed.scales,
            packed.zeros if packed.zeros is not None else packed.offsets,
            x,
            packed.columns,
            bias,
            out,
            c_int32(0),
            groups.tiles_of(size),
            None if in_order else groups.rows,
        ],
        shared_bytes=layout.num_bytes(size),
        cluster=(plan.cluster, 1, 1) if plan.cluster > 1 else None,
        programmatic=True,
    )


def mma_multiply(
    packed: PackedInteger,
    x: Tensor,
    groups: CudaTokenGroups,
    bias: Tensor | None,
    tile: MmaTile,
    exponent: int,
    out: Tensor,
) -> None:
    """The mma.sync kernel. x: as gather_inputs gives it."""
    problem = _MmaProblem(
        packed.out_features,
        x.shape[0],
        packed.padded_columns // CHUNK,
        x.shape[1],
        PackedWeights.of(packed, exponent, x.dtype),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0,
        groups.tiles_of(tile.tokens),
    )
    cuda_kernel(mma.SOURCE, mma.ENTRY, tile.macros(packed, x.dtype) | _macros(groups)).launch(
        grid=(-(-packed.out_features // mma.ROWS), groups.most_tiles(tile.tokens), 1),
        block=(_MMA_THREADS, 1, 1),
        args=[problem],
        shared_bytes=tile.shared_bytes(packed),
        programmatic=True,
    )


def wgmma_multiply(
    packed: PackedInteger,
    x: Tensor,
    groups: CudaTokenGroups,
    bias: Tensor | None,
    tile: WgmmaTile,
    exponent: int,
    out: Tensor,
    multiprocessors: int | None = None,
) -> None:
    """The wgmma kernel. x: as gather_inputs gives it. Persistent blocks fill `multiprocessors`, or all."""
    steps = packed.padded_columns // (CHUNK * tile.chunks)
    problem = _WgmmaProblem(
        _extent(packed.out_features, x, steps, tile, groups),
        PackedWeights.of(packed, exponent, x.dtype),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    inputs = TensorMap.of(x, (tile.tokens // tile.multicast, CHUNK), swizzle=128)
    cuda_kernel(wgmma.SOURCE, wgmma.ENTRY, tile.macros(packed, x.dtype) | _macros(groups)).launch(
        grid=(_num_blocks(packed.out_features, tile, groups, x, multiprocessors), 1, 1),
        block=((tile.warpgroups + 1) * 128, 1, 1),
        args=[inputs, problem],
        shared_bytes=tile.shared_bytes(packed),
        cluster=(tile.cluster, 1, 1) if tile.cluster > 1 else None,
        programmatic=True,
    )


def float8_multiply(
    weight: Tensor,
    row_scales: Tensor,
    x: Tensor,
    token_scales: Tensor,
    groups: CudaTokenGroups,
    bias: Tensor | None,
    tile: Float8Tile,
    out: Tensor,
    out_features: int,
    *,
    block_rows: int | None = None,
    multiprocessors: int | None = None,
) -> None:
    """e4m3 x [T * k, K] in the order of places times e4m3 weight [E * N, K].

    Scales: [E, N] and [T * k]; with `block_rows` [E, blocks of rows, blocks of columns] and [blocks of columns, line
    length], where the token of a place stands at `groups.lines`.
    """
    problem = _Float8Problem(
        _extent(out_features, x, -(-weight.shape[1] // STEP), tile, groups),
        1,
        1,
        token_scales.shape[-1] if block_rows is not None else 0,
        row_scales.shape[-1] if block_rows is not None else 0,
        token_scales.data_ptr(),
        row_scales.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    inputs = TensorMap.of(x, (tile.tokens // tile.multicast, STEP), swizzle=128)
    weights = TensorMap.of(weight, (tile.rows, STEP), swizzle=128)
    cuda_kernel(float8.SOURCE, float8.ENTRY, tile.macros(out.dtype, block_rows) | _macros(groups)).launch(
        grid=(_num_blocks(out_features, tile, groups, x, multiprocessors), 1, 1),
        block=((tile.warpgroups + 1) * 128, 1, 1),
        args=[inputs, weights, problem],
        shared_bytes=tile.shared_bytes(block_rows is not None),
        cluster=(tile.cluster, 1, 1) if tile.cluster > 1 else None,
        programmatic=True,
    )


def _macros(groups: CudaTokenGroups) -> dict[str, Macro]:
    """The first product with a list of tiles waits for it and lets nothing behind it start before: others need not."""
    early = groups.progress.multiplied
    groups.progress.multiplied = True
    return GROUPED | {"EARLY_TILES": 1} if early else GROUPED


def _extent(rows: int, x: Tensor, steps: int, tile: WgmmaTile | Float8Tile, groups: CudaTokenGroups) -> _Extent:
    return _Extent(rows, x.shape[0], steps, -(-rows // tile.rows), 0, 0, groups.tiles_of(tile.tokens))


def _num_blocks(
    rows: int, tile: WgmmaTile | Float8Tile, groups: CudaTokenGroups, x: Tensor, multiprocessors: int | None
) -> int:
    """For the most tiles that there can be; persistent blocks find out how many there are."""
    row_tiles = -(-rows // tile.rows)
    clusters = -(-row_tiles // tile.multicast) * groups.most_tiles(tile.tokens)
    if tile.persistent:
        multiprocessors = multiprocessors or gpu(x.get_device()).multiprocessors
        clusters = min(clusters, multiprocessors * tile.blocks // tile.cluster)
    return clusters * tile.cluster
