"""Norms of queries and keys, rotary positions, and the write into the paged KV cache, in one pass."""

from __future__ import annotations

from ctypes import c_float, c_int32
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aphroquant.kernels.cuda.attention.shape import AttentionShape
from aphroquant.kernels.cuda.fused.elements import element_macro
from aphroquant.kernels.cuda.launcher import cuda_kernel

if TYPE_CHECKING:
    from aphroquant.engine.kv_cache import LayerCache

_THREADS = 128


class HeadNorms(NamedTuple):
    """Gains of the norms over a head vector, float32 [head_dim] each, and their epsilon."""

    query_gain: Tensor
    key_gain: Tensor
    eps: float


class FusedRotaryCache:
    """From the joint projection [T, (heads + 2 * kv heads) * d] to rotated queries; keys and values go to the cache."""

    def __init__(
        self, shape: AttentionShape, dtype: torch.dtype, *, has_norm: bool = False, rotary_dim: int | None = None
    ) -> None:
        """`rotary_dim`: only so many channels rotate; all if None."""
        self._shape, self._dtype = shape, dtype
        self._rotary_dim = shape.head_dim if rotary_dim is None else rotary_dim
        macros = {
            **shape.cache_macros(),
            "NUM_HEADS": shape.num_heads,
            "ROTARY_DIM": self._rotary_dim,
            "HAS_NORM": int(has_norm),
            "THREADS": _THREADS,
        } | element_macro(dtype)
        self._kernel = cuda_kernel("fused_rotary_cache.cu", "fused_rotary_cache", macros)
        self._heads_per_block = _THREADS // lanes_per_head(shape.head_dim, self._rotary_dim)

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        cache: LayerCache,
        *,
        norms: HeadNorms | None = None,
        programmatic: bool = False,
    ) -> Tensor:
        """Queries [T, heads, d]. positions int32 [T]; slots int64 [T], negative ones write nothing.

        `cos_sin`: float32 [positions, rotary_dim / 2] each, of all positions from 0 on.
        """
        shape, num_tokens = self._shape, qkv.shape[0]
        queries = torch.empty(num_tokens, shape.num_heads, shape.head_dim, dtype=self._dtype, device=qkv.device)
        num_vectors = num_tokens * (shape.num_heads + 2 * shape.num_kv_heads)
        if num_vectors:
            self._kernel.launch(
                grid=(-(-num_vectors // self._heads_per_block), 1, 1),
                block=(_THREADS, 1, 1),
                args=[
                    qkv,
                    positions,
                    slots,
                    *cos_sin,
                    norms.query_gain if norms else None,
                    norms.key_gain if norms else None,
                    queries,
                    cache.keys,
                    cache.values,
                    cache.key_scales,
                    cache.value_scales,
                    c_float(norms.eps if norms else 0.0),
                    c_int32(num_tokens),
                ],
                programmatic=programmatic,
            )
        return queries


def lanes_per_head(head_dim: int, rotary_dim: int) -> int:
    """Neighbouring lanes that have one head vector, as fused_rotary_cache.cu divides it."""
    half = rotary_dim // 2
    width = next(width for width in (8, 4, 2, 1) if half % width == 0 and head_dim % width == 0)
    lanes = 1
    while lanes < min(32, half // width):
        lanes *= 2
    return lanes
