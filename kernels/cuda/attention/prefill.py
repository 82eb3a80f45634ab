"""Causal attention of several new tokens a sequence: prompts, chunks of them, mixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.prefill_batch import PrefillArguments, PrefillBatch
from aphroquant.kernels.cuda.attention.prefill_wgmma import WgmmaPrefill, WgmmaTile, wgmma_tile
from aphroquant.kernels.cuda.attention.shape import AttentionShape, softmax_scale
from aphroquant.kernels.cuda.fused.elements import element_macro
from aphroquant.kernels.cuda.launcher import cuda_kernel

if TYPE_CHECKING:
    from aphroquant.engine.kv_cache import LayerCache

_CONTEXT_TILE = 64  # tokens, as in attention_prefill.cu
_WARPS = 8  # 4 took 1.15 times as long on an H100


class _Arguments(PrefillArguments):
    """`Arguments` of attention_prefill.cu."""

    _fields_ = (("scale", c_float),)


def query_tiles(query_lens: Sequence[int], context_lens: Sequence[int], rows_per_token: int, tile_rows: int) -> Tensor:
    """The blocks of a launch, int32 [tiles, 2]: sequence and first row; those with the most context first."""
    tiles = []
    for sequence, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        for row in range(0, query_len * rows_per_token, tile_rows):
            visible = context_len - query_len + (row + tile_rows) // rows_per_token
            tiles.append((-visible, sequence, row))
    return torch.tensor([(sequence, row) for _, sequence, row in sorted(tiles)], dtype=torch.int32).view(-1, 2)


def shared_bytes(shape: AttentionShape) -> int:
    """Dynamic shared memory of a block: two stages, and for 8-bit caches a tile of operands behind them."""
    operands = 2 * _CONTEXT_TILE * (shape.head_dim * 2 + 16)
    scales = 2 * _CONTEXT_TILE * 4
    if shape.key.dtype.itemsize == 2 and shape.value.dtype.itemsize == 2:
        return 2 * (operands + scales)
    widest = max(shape.key.dtype.itemsize, shape.value.dtype.itemsize)
    return 2 * (2 * _CONTEXT_TILE * shape.head_dim * widest + scales) + operands


class PagedPrefill:
    """softmax(scale * q k^T) v where a token sees what came before it, over the cache that holds the batch already."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        scale: float,
        *,
        warps: int | None = None,
        wgmma: WgmmaTile | None = None,
    ) -> None:
        """`warps` of the kernel for any GPU, or the tile of the one for Hopper; by default what suits shape and GPU."""
        if wgmma is None and warps is None:
            wgmma = wgmma_tile(shape)
        self._shape, base_scale = shape, softmax_scale(scale)
        self._kernel: WgmmaPrefill | MmaPrefill
        if wgmma is not None:
            self._kernel = WgmmaPrefill(shape, dtype, base_scale, wgmma)
        else:
            self._kernel = MmaPrefill(shape, dtype, base_scale, warps or _WARPS)

    def tiles(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Tensor:
        """What `__call__` wants as `tiles`, still on the CPU: the same for all layers."""
        return query_tiles(query_lens, context_lens, self._shape.group, self._kernel.tile_rows)

    def __call__(
        self,
        queries: Tensor,
        output: Tensor,
        cache: LayerCache,
        block_tables: Tensor,
        context_lens: Tensor,
        query_start: Tensor,
        tiles: Tensor,
        *,
        sliding_window: int | None = None,
        programmatic: bool = False,
    ) -> None:
        """Write into `output`, like queries [T, heads, d]; rows of sequences without tiles are left alone.

        block_tables int32 [S, ...], context_lens int32 [S], query_start int32 [S + 1], all on the device.
        """
        if tiles.shape[0]:
            window = sliding_window or 0
            batch = PrefillBatch(queries, output, cache, block_tables, context_lens, query_start, tiles, window)
            self._kernel.launch(batch, programmatic=programmatic)


class MmaPrefill:
    """What PagedPrefill launches on other GPUs than Hopper, and for int8 caches and other head sizes."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, scale: float, warps: int) -> None:
        """`scale`: of the scores, for a softmax to base 2."""
        self._shape, self._scale, self._warps = shape, scale, warps
        self.tile_rows = warps * 16
        macros = {**shape.macros(), "WARPS": warps} | element_macro(dtype)
        self._kernel = cuda_kernel("attention_prefill.cu", "attention_prefill", macros)
        self._shared_bytes = shared_bytes(shape)

    def launch(self, batch: PrefillBatch, *, programmatic: bool) -> None:
        arguments = _Arguments(*batch.arguments(), self._scale)
        self._kernel.launch(
            grid=(batch.tiles.shape[0], self._shape.num_kv_heads, 1),
            block=(self._warps * 32, 1, 1),
            args=[arguments],
            shared_bytes=self._shared_bytes,
            programmatic=programmatic,
        )
