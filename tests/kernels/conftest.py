"""Fixtures for the compiled kernels: every instruction set, and calls below the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import byref, pointer

import pytest
import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache
from aphroquant.kernels.cpu import library
from aphroquant.kernels.cpu.abi import CACHE_TYPES, DecoderStruct, LayerStruct, address, aligned_bytes
from aphroquant.kernels.cpu.batch import batch_struct


@pytest.fixture(params=["avx512", "avx2_vnni", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once for each instruction set of this processor."""
    if reason := library.obstacle():
        pytest.skip(reason)
    name: str = request.param
    available = library.instruction_sets()
    if name not in available:
        pytest.skip(f"this processor has no {name}")
    library.select_instruction_set(name)
    yield name
    library.select_instruction_set(available[0])


@pytest.fixture
def compiled() -> None:
    """The test needs the compiled library."""
    if reason := library.obstacle():
        pytest.skip(reason)


class CacheKernels:
    """Storing and attention of the compiled library on layer 0 of a cache."""

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
        struct = self._struct(batch)
        library.library().aq_store(byref(self._decoder), byref(struct), address(k), address(v))

    def attend(self, batch: ForwardBatch, q: Tensor) -> Tensor:
        struct, out = self._struct(batch), torch.full_like(q, torch.nan)
        decoder, batch_ref = byref(self._decoder), byref(struct)
        size = library.library().aq_decoder_workspace(decoder, batch_ref, self._num_threads)
        workspace = aligned_bytes(size)
        library.library().aq_attention(
            decoder, batch_ref, address(q), out.data_ptr(), workspace.data_ptr(), self._num_threads
        )
        return out

    def _struct(self, batch: ForwardBatch):  # type: ignore[no-untyped-def]
        cache = self._cache
        table = torch.zeros(1)
        return batch_struct(
            batch, vocab_size=1, num_blocks=cache.num_blocks, block_size=cache.block_size, cos=table, sin=table
        )


@pytest.fixture
def cache_kernels(compiled: None) -> Callable[..., CacheKernels]:
    """`cache_kernels(cache, sliding_window=, num_threads=)`."""
    return CacheKernels
