"""Storing keys and values and attention of the compiled library, on one layer of a cache and outside the decoder."""

from __future__ import annotations

from ctypes import byref, pointer

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache
from aphroquant.kernels.cpu.abi import CACHE_TYPES, BatchStruct, DecoderStruct, LayerStruct, address, aligned_bytes
from aphroquant.kernels.cpu.batch import batch_struct
from aphroquant.kernels.cpu.library import library


class CacheKernels:
    """What the compiled decoder does with layer 0 of a cache."""

    def __init__(self, cache: KVCache, *, sliding_window: int | None = None, num_threads: int = 2) -> None:
        spec, memory = cache.spec, cache.layer(0)
        self._cache, self._num_threads = cache, num_threads
        self._layers = (LayerStruct * 1)()
        layer = self._layers[0]
        layer.keys, layer.values = memory.keys.data_ptr(), memory.values.data_ptr()
        layer.key_scales, layer.value_scales = address(memory.key_scales), address(memory.value_scales)
        layer.sliding_window = sliding_window or 0
        self._decoder = DecoderStruct(
            num_layers=0,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=cache.block_size,
            softmax_scale=spec.head_dim**-0.5,
            key_type=CACHE_TYPES[cache.scheme.key.dtype],
            value_type=CACHE_TYPES[cache.scheme.value.dtype],
            layers=pointer(self._layers[0]),
        )

    def store(self, batch: ForwardBatch, k: Tensor, v: Tensor) -> None:
        """k, v float32 [T, kv heads, d]."""
        struct = self._struct(batch)
        library().aq_store(byref(self._decoder), byref(struct), address(k), address(v))

    def attend(self, batch: ForwardBatch, q: Tensor) -> Tensor:
        """q float32 [T, heads, d] -> the same shape."""
        struct, out = self._struct(batch), torch.full_like(q, torch.nan)
        decoder, batch_ref = byref(self._decoder), byref(struct)
        workspace = aligned_bytes(library().aq_decoder_workspace(decoder, batch_ref, self._num_threads))
        library().aq_attention(decoder, batch_ref, address(q), out.data_ptr(), workspace.data_ptr(), self._num_threads)
        return out

    def _struct(self, batch: ForwardBatch) -> BatchStruct:
        cache, table = self._cache, torch.zeros(1)
        return batch_struct(
            batch, vocab_size=1, num_blocks=cache.num_blocks, block_size=cache.block_size, cos=table, sin=table
        )
