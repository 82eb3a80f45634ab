"""Paged attention equals plain attention in float64, whatever the blocks, chunks, heads and windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache, KVScheme
from aphroquant.kernels.reference.attention import paged_attention
from aphroquant.models.spec import DecoderSpec, RopeSpec

HEAD_DIM, BLOCK_SIZE = 8, 4


def spec(num_heads: int, num_kv_heads: int) -> DecoderSpec:
    return DecoderSpec(
        "llama", 10, 64, 64, 1, num_heads, num_kv_heads, HEAD_DIM, 1e-5, 64, RopeSpec(1e4),
        True, False, False, False, False, (None,),
    )  # fmt: skip


def batch(query_lens: list[int], context_lens: list[int], tables: Tensor) -> ForwardBatch:
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return ForwardBatch(
        token_ids=torch.zeros_like(positions, dtype=torch.int32),
        positions=positions.int(),
        slot_mapping=slots,
        query_start=starts.int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables.int(),
        logits_rows=(starts[1:] - 1).int(),
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, first: int, window: int | None) -> Tensor:
    """Query by query, in float64: q [n, heads, d] begins at position `first` of k, v [context, kv heads, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    rows = []
    for index, query in enumerate(q.double()):
        position = first + index
        begin = 0 if window is None else max(0, position - window + 1)
        scores = torch.einsum("hd,chd->hc", query, k[begin : position + 1]) * 0.3
        rows.append(torch.einsum("hc,chd->hd", scores.softmax(-1), v[begin : position + 1]))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_it_equals_plain_attention(num_heads: int, num_kv_heads: int, window: int | None) -> None:
    query_lens, context_lens = [1, 3, 7, 1, 2], [9, 3, 16, 1, 13]
    cache = KVCache(spec(num_heads, num_kv_heads), KVScheme.named("float32"), 20, BLOCK_SIZE)
    tables = torch.randperm(20).reshape(5, 4)
    layout = batch(query_lens, context_lens, tables)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(float("nan"))  # what nobody stored must not be read
    keys = [torch.randn(length, num_kv_heads, HEAD_DIM) for length in context_lens]
    values = [torch.randn(length, num_kv_heads, HEAD_DIM) for length in context_lens]
    for sequence, length in enumerate(context_lens):
        positions = torch.arange(length)
        slots = tables[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        cache.store(0, slots, keys[sequence], values[sequence])
    q = torch.randn(sum(query_lens), num_heads, HEAD_DIM)
    mixed = paged_attention(q, layout, cache.layer(0), scale=0.3, sliding_window=window)
    expected = torch.cat(
        [
            plain_attention(part, keys[s], values[s], context_lens[s] - query_lens[s], window)
            for s, part in enumerate(q.split(query_lens))
        ]
    )
    error = float((mixed - expected).abs().max())
    assert error < 1e-5, f"largest error {error:.2e}"


def test_results_keep_the_dtype_of_the_queries() -> None:
    cache = KVCache(spec(2, 2), KVScheme.named("bfloat16"), 2, BLOCK_SIZE)
    layout = batch([3], [3], torch.tensor([[1]]))
    cache.store(0, layout.slot_mapping, torch.randn(3, 2, HEAD_DIM), torch.randn(3, 2, HEAD_DIM))
    q = torch.randn(3, 2, HEAD_DIM, dtype=torch.bfloat16)
    assert paged_attention(q, layout, cache.layer(0), scale=1.0, sliding_window=None).dtype == torch.bfloat16


def test_sequences_of_one_batch_do_not_see_each_other() -> None:
    cache = KVCache(spec(2, 1), KVScheme.named("float32"), 4, BLOCK_SIZE)
    tables = torch.tensor([[0], [2]])
    both = batch([2, 3], [2, 3], tables)
    k, v, q = torch.randn(5, 1, HEAD_DIM), torch.randn(5, 1, HEAD_DIM), torch.randn(5, 2, HEAD_DIM)
    cache.store(0, both.slot_mapping, k, v)
    together = paged_attention(q, both, cache.layer(0), scale=1.0, sliding_window=None)
    alone = paged_attention(q[2:], batch([3], [3], tables[1:]), cache.layer(0), scale=1.0, sliding_window=None)
    torch.testing.assert_close(together[2:], alone)
