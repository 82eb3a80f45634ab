"""The compiled cache and attention: the reference's stored bits and results, whatever the chunks and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KV_FORMATS, KVCache, KVScales, KVScheme
from aphroquant.kernels.reference.attention import paged_attention
from aphroquant.models.spec import DecoderSpec, RopeSpec

TOLERANCE = 3e-6  # absolute, on values of unit size: float32 sums in another order

MakeKernels = Callable[..., Any]


def spec(num_heads: int, num_kv_heads: int, head_dim: int) -> DecoderSpec:
    return DecoderSpec(
        "llama", 10, 64, 64, 1, num_heads, num_kv_heads, head_dim, 1e-5, 64, RopeSpec(1e4),
        True, False, False, False, False, (None,),
    )  # fmt: skip


def batch_of(query_lens: list[int], context_lens: list[int], tables: Tensor, block_size: int) -> ForwardBatch:
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    return ForwardBatch(
        token_ids=torch.zeros_like(positions, dtype=torch.int32),
        positions=positions.int(),
        slot_mapping=tables[owners, positions // block_size] * block_size + positions % block_size,
        query_start=starts.int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables.int(),
        logits_rows=(starts[1:] - 1).int(),
    )


class Filled:
    """A cache with random keys and values of several sequences, in shuffled blocks."""

    def __init__(
        self, context_lens: list[int], *, heads: tuple[int, int] = (6, 2), head_dim: int = 32, block_size: int = 16,
        scheme: KVScheme | None = None,
    ) -> None:  # fmt: skip
        self.context_lens, self.block_size = context_lens, block_size
        blocks = -(-max(context_lens) // block_size)
        num_blocks = blocks * len(context_lens) + 1
        scales = [KVScales(torch.rand(heads[1]) * 0.1 + 0.01, torch.rand(heads[1]) * 0.1 + 0.01)]
        self.cache = KVCache(
            spec(*heads, head_dim), scheme or KVScheme.named("float32"), num_blocks, block_size, scales
        )
        self.cache.keys[0].view(torch.uint8).fill_(
            0xFF
        )  # NaN in every float format: what is not stored must not be read
        self.cache.values[0].view(torch.uint8).fill_(0xFF)
        self.tables = torch.randperm(num_blocks)[: blocks * len(context_lens)].view(len(context_lens), blocks)
        whole = batch_of(context_lens, context_lens, self.tables, block_size)
        tokens = sum(context_lens)
        self.cache.store(
            0, whole.slot_mapping, torch.randn(tokens, heads[1], head_dim), torch.randn(tokens, heads[1], head_dim)
        )
        self.q = torch.randn(tokens, heads[0], head_dim)

    def batch(self, query_lens: list[int], context_lens: list[int] | None = None) -> ForwardBatch:
        return batch_of(query_lens, context_lens or self.context_lens, self.tables, self.block_size)


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [32, 20])
def test_stored_bits_equal_the_references(
    instruction_set: str, cache_kernels: MakeKernels, name: str, head_dim: int
) -> None:
    scales = [KVScales(torch.tensor([0.05, 0.3]), torch.tensor([0.02, 1.0]))]
    first, second = (KVCache(spec(2, 2, head_dim), KVScheme.named(name), 5, 4, scales) for _ in range(2))
    k, v = torch.randn(12, 2, head_dim) * 3, torch.randn(12, 2, head_dim)
    k[0] *= 1e6  # beyond float16 and fp8
    k[1] *= 1e-7  # subnormal in float16 and fp8
    v[2] = 0.0
    v[3, :, 5] = torch.inf
    v[4, :, ::2] = torch.arange(head_dim // 2) / 2 - 3  # ties
    v[4, :, 1::2] = 127.0
    tables = torch.tensor([[3, 0, 4]])
    batch = batch_of([12], [12], tables, 4)
    first.store(0, batch.slot_mapping, k, v)
    cache_kernels(second).store(batch, k, v)
    row = torch.ones(20, dtype=torch.bool)
    if name == "int8_per_token_head":
        row[4 * 3 + 3] = False  # infinity in int8: any code, but the scale must say so
    for one, other in zip(first.layer(0), second.layer(0), strict=True):
        if one is None:
            assert other is None
            continue
        one, other = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (one, other))
        if one.dim() == 1:
            assert torch.equal(one, other)
            continue
        by_slot = (t.transpose(1, 2).flatten(0, 1)[row] for t in (one, other))
        assert torch.equal(*by_slot)
    if name == "int8_per_token_head":
        assert second.value_scales[0] is not None
        assert not second.value_scales[0][3, :, 3].isfinite().any()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "fp8_e4m3"])
def test_nan_is_stored_as_nan(instruction_set: str, cache_kernels: MakeKernels, name: str) -> None:
    cache = KVCache(spec(1, 1, 16), KVScheme.named(name), 1, 4)
    batch = batch_of([1], [1], torch.tensor([[0]]), 4)
    k = torch.full((1, 1, 16), torch.nan)
    cache_kernels(cache).store(batch, k, k)
    assert cache.layer(0).read(torch.tensor([0]))[0][:, 0].isnan().all()


@pytest.mark.parametrize("name", KV_FORMATS)
def test_attention_equals_the_reference(instruction_set: str, cache_kernels: MakeKernels, name: str) -> None:
    filled = Filled([300, 37, 1, 520], scheme=KVScheme.named(name))
    batch = filled.batch([3, 37, 1, 70])
    q = filled.q[: batch.num_tokens]
    for window in (None, 5, 290):
        kernels = cache_kernels(filled.cache, sliding_window=window)
        expected = paged_attention(q, batch, filled.cache.layer(0), scale=32**-0.5, sliding_window=window)
        assert (kernels.attend(batch, q) - expected).abs().max() < TOLERANCE


def test_keys_and_values_may_have_different_formats(instruction_set: str, cache_kernels: MakeKernels) -> None:
    scheme = KVScheme(KV_FORMATS["int8_per_token_head"], KV_FORMATS["bfloat16"])
    filled = Filled([70], scheme=scheme)
    batch = filled.batch([40])
    expected = paged_attention(
        filled.q[:40], batch, filled.cache.layer(0), scale=32**-0.5, sliding_window=None
    )  # fmt: skip
    assert (cache_kernels(filled.cache).attend(batch, filled.q[:40]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 96])
def test_any_heads_and_head_sizes(cache_kernels: MakeKernels, heads: tuple[int, int], head_dim: int) -> None:
    filled = Filled([90, 21], heads=heads, head_dim=head_dim)
    for lens in ([1, 1], [30, 21]):
        batch = filled.batch(lens)
        q = filled.q[: sum(lens)].contiguous()
        expected = paged_attention(q, batch, filled.cache.layer(0), scale=head_dim**-0.5, sliding_window=None)
        assert (cache_kernels(filled.cache).attend(batch, q) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("block_size", [1, 4, 16, 24, 32, 300])
def test_any_block_size(cache_kernels: MakeKernels, block_size: int) -> None:
    filled = Filled([290, 33], block_size=block_size)
    batch = filled.batch([50, 1])
    q = filled.q[:51].contiguous()
    expected = paged_attention(q, batch, filled.cache.layer(0), scale=32**-0.5, sliding_window=None)
    assert (cache_kernels(filled.cache).attend(batch, q) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("name", ["float32", "int8_per_token_head"])
@pytest.mark.parametrize("heads", [(6, 2), (5, 5), (9, 1)])
def test_a_query_is_the_same_bits_in_any_chunk_batch_and_team(
    instruction_set: str, cache_kernels: MakeKernels, heads: tuple[int, int], name: str, window: int | None
) -> None:
    context = 560
    filled = Filled([context, 300], heads=heads, scheme=KVScheme.named(name))
    whole = cache_kernels(filled.cache, sliding_window=window).attend(filled.batch([context, 300]), filled.q)
    for num_threads in (1, 3):
        kernels = cache_kernels(filled.cache, sliding_window=window, num_threads=num_threads)
        for end, length in ((1, 1), (18, 18), (257, 1), (400, 33), (560, 3), (560, 1)):
            batch = filled.batch([length, 2], [end, 300])
            first, last = filled.q[end - length : end], filled.q[-2:]
            found = kernels.attend(batch, torch.cat([first, last]))
            assert torch.equal(found, torch.cat([whole[end - length : end], whole[-2:]]))


def test_nan_in_a_key_reaches_later_queries_of_its_own_sequence_only(
    instruction_set: str, cache_kernels: MakeKernels
) -> None:
    filled = Filled([60, 60])
    batch = filled.batch([60, 60])
    clean = cache_kernels(filled.cache).attend(batch, filled.q)
    slot = int(filled.tables[0, 2]) * 16 + 8  # position 40 of the first sequence
    filled.cache.keys[0][slot // 16, :, slot % 16] = torch.nan
    found = cache_kernels(filled.cache).attend(batch, filled.q)
    assert torch.equal(found[:40], clean[:40])
    assert torch.equal(found[60:], clean[60:])
    assert found[40:60].isnan().all()
