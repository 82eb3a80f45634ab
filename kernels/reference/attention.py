"""Attention over the paged KV cache, plain: the definition that compiled attention is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.engine.batch import BatchLayout
from aphroquant.engine.kv_cache import LayerCache


def paged_attention(
    q: Tensor, batch: BatchLayout, cache: LayerCache, *, scale: float, sliding_window: int | None
) -> Tensor:
    """softmax(scale * q k^T) v for q [T, heads, d] of all sequences, like q; computed in float32.

    Keys and values of the batch's own tokens are already stored. Query i of a sequence sees the positions up to its
    own; with a sliding window only the last `sliding_window` of them, itself included.
    """
    starts, context_lens = batch.query_start.tolist(), batch.context_lens.tolist()
    block_size = cache.keys.shape[2]
    mixed = torch.empty_like(q)
    for sequence, context_len in enumerate(context_lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        blocks = batch.block_tables[sequence, : -(-context_len // block_size)].long()
        keys, values = (stored[:, :context_len] for stored in cache.read(blocks))  # [kv heads, context, d]
        queries = q[rows].float().transpose(0, 1)  # [heads, queries, d]
        mask = _mask(queries.shape[1], context_len, sliding_window)
        result = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
        )
        mixed[rows] = result[0].transpose(0, 1).to(q.dtype)
    return mixed


def _mask(query_len: int, context_len: int, sliding_window: int | None) -> Tensor | None:
    """True where a query [queries, context] sees a key; None if all see all."""
    if query_len == 1 and (sliding_window is None or context_len <= sliding_window):
        return None
    positions = torch.arange(context_len - query_len, context_len)[:, None]
    distance = positions - torch.arange(context_len)[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)
