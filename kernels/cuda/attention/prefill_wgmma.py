"""Attention of several new tokens a sequence on Hopper: a tile's products by wgmma, its pages by the copy engine."""

from __future__ import annotations

from ctypes import c_float, c_int32
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.prefill_batch import PrefillArguments, PrefillBatch
from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.device import architecture
from aphroquant.kernels.cuda.fused.elements import element_macro
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel

HEAD_DIMS = (64, 128)
_GROUP_TOKENS = 8  # whose rows are swizzled together
_PAGE_TOKENS = 16  # of one copy
_CHANNELS = 64  # of a row of shared memory


@dataclass(frozen=True)
class WgmmaTile:
    """How the kernel is cut: warpgroups of 64 rows, tokens of a stage, stages; a side's stages of codes, if 8-bit."""

    warpgroups: int = 2
    tokens: int = 128
    stages: int = 2
    staged: int = 2

    def macros(self) -> dict[str, int]:
        return {"WARPGROUPS": self.warpgroups, "TILE": self.tokens, "STAGES": self.stages, "STAGED": self.staged}


class _Arguments(PrefillArguments):
    """`Arguments` of attention_prefill_wgmma.cu."""

    _fields_ = (
        ("num_groups", c_int32),
        ("num_tasks", c_int32),
        ("scale", c_float),
    )


def wgmma_tile(shape: AttentionShape) -> WgmmaTile | None:
    """The tile for the current GPU, or None where the kernel does not run."""
    if not torch.cuda.is_available() or architecture() != "sm_90a":
        return None
    sides = (shape.key, shape.value)
    if shape.head_dim not in HEAD_DIMS or any(side.scaling == "token_head" for side in sides):
        return None
    if shape.key.dtype.itemsize != shape.value.dtype.itemsize:
        return None
    if shape.key.dtype.itemsize == 1:
        return WgmmaTile()
    return WgmmaTile(warpgroups=3) if shape.head_dim == 64 else WgmmaTile(tokens=160)


def shared_bytes(shape: AttentionShape, tile: WgmmaTile) -> int:
    """Dynamic shared memory of a block: queries, stages of keys and values, barriers, and room to align."""
    row = shape.head_dim * 2
    codes = 2 * tile.staged * tile.tokens * shape.head_dim if shape.key.dtype.itemsize == 1 else 0
    barriers = 8 * (4 * tile.stages + 2 * tile.staged)
    buffers = 1 if codes else 2  # of queries
    return row * (buffers * tile.warpgroups * 64 + 2 * tile.stages * tile.tokens) + codes + barriers + 1024


class WgmmaPrefill:
    """What PagedPrefill launches on Hopper."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, scale: float, tile: WgmmaTile) -> None:
        """`scale`: of the scores, for a softmax to base 2."""
        self._shape, self._scale, self._tile = shape, scale, tile
        self.tile_rows = tile.warpgroups * 64
        macros = {**shape.macros(), **tile.macros(), **element_macro(dtype)}
        self._kernel = cuda_kernel("attention_prefill_wgmma.cu", "attention_prefill_wgmma", macros)
        self._shared_bytes = shared_bytes(shape, tile)
        self._max_blocks = _multiprocessors()
        self._maps: dict[tuple[int, torch.Size], TensorMap] = {}  # of the cache's layers

    def launch(self, batch: PrefillBatch, *, programmatic: bool) -> None:
        num_tasks = batch.tiles.shape[0] * self._shape.num_kv_heads
        arguments = _Arguments(
            *batch.arguments(),
            batch.cache.keys.numel() // (_GROUP_TOKENS * self._shape.head_dim),
            num_tasks,
            self._scale,
        )
        self._kernel.launch(
            grid=(min(num_tasks, self._max_blocks), 1, 1),
            block=((self._tile.warpgroups + 1) * 128, 1, 1),
            args=[self._map(batch.cache.keys), self._map(batch.cache.values), arguments],
            shared_bytes=self._shared_bytes,
            programmatic=programmatic,
        )

    def _map(self, side: Tensor) -> TensorMap:
        key = (side.data_ptr(), side.shape)
        if (known := self._maps.get(key)) is None:
            known = self._maps[key] = page_map(side)
        return known


def page_map(side: Tensor) -> TensorMap:
    """Boxes of 16 tokens of one page, for keys or values [num_blocks, kv heads, block_size, d].

    A box is [2 groups of eight tokens][d / 64][8 tokens][64 channels]: rows of 128 bytes, swizzled for wgmma.
    """
    head_dim = side.shape[3]
    groups = side.view(-1, _GROUP_TOKENS, head_dim // _CHANNELS, _CHANNELS).transpose(1, 2)
    box = (_PAGE_TOKENS // _GROUP_TOKENS, head_dim // _CHANNELS, _GROUP_TOKENS, _CHANNELS)
    return TensorMap.of(groups, box, swizzle=128)


def _multiprocessors() -> int:
    """Blocks that run at the same time."""
    if not torch.cuda.is_available():
        return 3  # where kernels are emulated
    return int(torch.cuda.get_device_properties().multi_processor_count)
