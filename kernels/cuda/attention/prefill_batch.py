"""What both kernels for prompts are given of a batch: where its tensors lie, as the head of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int32, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from aphroquant.engine.kv_cache import LayerCache


class PrefillArguments(Structure):
    """The first fields of `Arguments` in attention_prefill.cu and attention_prefill_wgmma.cu; each appends its own."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("query_start", c_void_p),
        ("tiles", c_void_p),
        ("output", c_void_p),
        ("table_stride", c_int32),
        ("sliding_window", c_int32),
    )


class PrefillBatch(NamedTuple):
    """The tensors of PagedPrefill's call, on the device; `sliding_window` 0: none."""

    queries: Tensor
    output: Tensor
    cache: LayerCache
    block_tables: Tensor
    context_lens: Tensor
    query_start: Tensor
    tiles: Tensor
    sliding_window: int

    def arguments(self) -> tuple[int, ...]:
        """The values of PrefillArguments."""
        cache = self.cache
        return (
            self.queries.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            0 if cache.key_scales is None else cache.key_scales.data_ptr(),
            0 if cache.value_scales is None else cache.value_scales.data_ptr(),
            self.block_tables.data_ptr(),
            self.context_lens.data_ptr(),
            self.query_start.data_ptr(),
            self.tiles.data_ptr(),
            self.output.data_ptr(),
            self.block_tables.stride(0),
            self.sliding_window,
        )
