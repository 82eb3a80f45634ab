"""Attention of one new token a sequence."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.shape import TILE, AttentionShape, softmax_scale
from aphroquant.kernels.cuda.fused.elements import element_macro
from aphroquant.kernels.cuda.launcher import cuda_kernel

if TYPE_CHECKING:
    from aphroquant.engine.kv_cache import LayerCache

MAX_SPLITS = 64


@dataclass(frozen=True)
class DecodeTuning:
    """How the kernel is cut: warps of a block, stages of copies a warp, tiles of 16 tokens in a stage."""

    warps: int = 4
    stages: int = 3
    tiles: int = 1
    min_tokens: int = 128  # of a split: below, merging costs more than it saves


FEW_SPLITS = 4  # from so many splits on, few sequences have the GPU for themselves, a block a multiprocessor
FEW_SEQUENCES = DecodeTuning(warps=8, stages=3)


class DecodeArguments(Structure):
    """`Arguments` of attention_decode.cu."""

    _fields_ = (
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("output", c_void_p),
        ("partial_results", c_void_p),
        ("partial_sums", c_void_p),
        ("counters", c_void_p),
        ("table_stride", c_int32),
        ("sliding_window", c_int32),
        ("min_tokens", c_int32),
        ("scale", c_float),
    )


class DecodeWorkspace:
    """Memory for the parts of split contexts, shared by all layers. It must outlive the graphs captured with it."""

    def __init__(self, shape: AttentionShape, max_sequences: int, max_parts: int, device: torch.device) -> None:
        """`max_parts`: the largest product of sequences and splits of a launch."""
        self.max_sequences, self.max_parts = max_sequences, max_parts
        self.results = torch.empty(max_parts * shape.num_heads * shape.head_dim, device=device)
        self.sums = torch.empty(max_parts * shape.num_heads * 2, device=device)
        self.counters = torch.zeros(max_sequences * shape.num_kv_heads, dtype=torch.int32, device=device)


def num_splits(num_sequences: int, num_kv_heads: int, multiprocessors: int) -> int:
    """Splits of each context, so that a launch has about a block a multiprocessor, whatever the batch, and none more.

    Blocks that wait for the first to end cost most: 17 instead of 16 splits for 8 heads made it 1.2 times as long on an
    H100 with 132 multiprocessors, 2 instead of 1 for 128 heads 1.17 times.
    """
    return max(1, min(MAX_SPLITS, multiprocessors // (num_sequences * num_kv_heads)))


class _Variant:
    """The kernel in one cut."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, tuning: DecodeTuning) -> None:
        macros = {
            **shape.macros(),
            "WARPS": tuning.warps,
            "STAGES": tuning.stages,
            "TILES": tuning.tiles,
        } | element_macro(dtype)
        self.kernel = cuda_kernel("attention_decode.cu", "attention_decode", macros)
        self.tuning, self.shared_bytes = tuning, shared_bytes(shape, tuning)


class PagedDecode:
    """softmax(scale * q k^T) v for one query a sequence, over the cache that holds its key and value already."""

    def __init__(
        self, shape: AttentionShape, dtype: torch.dtype, scale: float, tuning: DecodeTuning | None = None
    ) -> None:
        """`tuning` instead of those that suit the shape and the batch."""
        self._shape = shape
        self._scale = softmax_scale(scale)
        many = _Variant(shape, dtype, tuning or choose_tuning(shape))
        self._many = self._few = many
        if tuning is None and shared_bytes(shape, FEW_SEQUENCES) <= shared_limit():
            self._few = _Variant(shape, dtype, FEW_SEQUENCES)

    def __call__(
        self,
        queries: Tensor,
        cache: LayerCache,
        block_tables: Tensor,
        context_lens: Tensor,
        workspace: DecodeWorkspace,
        *,
        splits: int,
        output: Tensor | None = None,
        sliding_window: int | None = None,
        programmatic: bool = False,
    ) -> Tensor:
        """Like queries [S, heads, d], into `output` if given. block_tables int32 [S, ...], context_lens int32 [S].

        A sequence without context gives zeros.
        """
        output = torch.empty_like(queries) if output is None else output
        num_sequences = queries.shape[0]
        if not num_sequences:
            return output
        assert num_sequences <= workspace.max_sequences
        assert num_sequences * splits <= workspace.max_parts
        variant = self._few if splits >= FEW_SPLITS else self._many
        arguments = DecodeArguments(
            queries.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            _address(cache.key_scales),
            _address(cache.value_scales),
            block_tables.data_ptr(),
            context_lens.data_ptr(),
            output.data_ptr(),
            workspace.results.data_ptr(),
            workspace.sums.data_ptr(),
            workspace.counters.data_ptr(),
            block_tables.stride(0),
            sliding_window or 0,
            variant.tuning.min_tokens,
            self._scale,
        )
        variant.kernel.launch(
            grid=(splits, self._shape.num_kv_heads, num_sequences),
            block=(variant.tuning.warps * 32, 1, 1),
            args=[arguments],
            shared_bytes=variant.shared_bytes,
            programmatic=programmatic,
        )
        return output


def choose_tuning(shape: AttentionShape) -> DecodeTuning:
    """Of those tried on an H100, at most 3 % slower than the best for any batch and context.

    16-bit caches: 3 stages of one tile; 8-bit ones: 2 stages of two tiles, so that scores of 32 tokens share a maximum.
    """
    tile_bytes = TILE * shape.vector_bytes()
    warps = 4 if tile_bytes <= 12288 else 2
    if tile_bytes <= 4096 + TILE * 8:
        return DecodeTuning(warps=warps, stages=2, tiles=2)
    return DecodeTuning(warps=warps, stages=3, tiles=1)


def shared_bytes(shape: AttentionShape, tuning: DecodeTuning) -> int:
    """Dynamic shared memory of a block: the copies on their way, later the results of its warps."""
    has_scales = "token_head" in (shape.key.scaling, shape.value.scaling)
    items = shape.key.dtype.itemsize + shape.value.dtype.itemsize
    tile_bytes = TILE * shape.head_dim * items + (2 * TILE * 4 if has_scales else 0)
    copies = tuning.warps * tuning.stages * tuning.tiles * tile_bytes
    return max(copies, tuning.warps * shape.group * shape.head_dim * 4)


def shared_limit() -> int:
    """Dynamic shared memory that a block may have beside the kernel's own, on the current GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", 0)) - 2048


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
