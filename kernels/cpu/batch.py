"""Forward batches as the compiled decoder reads them, checked before any address leaves Python."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.kernels.cpu.abi import BatchStruct, address


def batch_struct(
    batch: ForwardBatch, *, vocab_size: int, num_blocks: int, block_size: int, cos: Tensor, sin: Tensor
) -> BatchStruct:
    """The struct for one call. ValueError names a field that does not fit. `batch` must outlive the struct."""
    check_batch(batch, vocab_size=vocab_size, num_blocks=num_blocks, block_size=block_size)
    return BatchStruct(
        num_tokens=batch.num_tokens,
        num_sequences=batch.num_sequences,
        max_blocks=batch.block_tables.shape[1],
        num_logits=batch.logits_rows.shape[0],
        max_context=int(batch.context_lens.numpy().max(initial=0)),
        token_ids=address(batch.token_ids),
        positions=address(batch.positions),
        slot_mapping=address(batch.slot_mapping),
        query_start=address(batch.query_start),
        context_lens=address(batch.context_lens),
        block_tables=address(batch.block_tables),
        logits_rows=address(batch.logits_rows),
        cos=address(cos),
        sin=address(sin),
    )


def check_batch(batch: ForwardBatch, *, vocab_size: int, num_blocks: int, block_size: int) -> None:
    """Raise ValueError unless every index of the batch stays inside the memory that it points into."""
    tokens, sequences = batch.num_tokens, batch.num_sequences
    _require_vector("token_ids", batch.token_ids, torch.int32, tokens)
    _require_vector("positions", batch.positions, torch.int32, tokens)
    _require_vector("slot_mapping", batch.slot_mapping, torch.int64, tokens)
    _require_vector("query_start", batch.query_start, torch.int32, sequences + 1)
    _require_vector("context_lens", batch.context_lens, torch.int32, sequences)
    _require_vector("logits_rows", batch.logits_rows, torch.int32, batch.logits_rows.shape[0])
    tables = batch.block_tables
    if tables.dtype != torch.int32 or tables.dim() != 2 or tables.shape[0] != sequences or not tables.is_contiguous():
        raise ValueError(
            f"block_tables must be contiguous int32 [{sequences}, blocks], not {tables.dtype} {list(tables.shape)}"
        )
    _require_range("token_ids", batch.token_ids, vocab_size)
    _require_range("slot_mapping", batch.slot_mapping, num_blocks * block_size)
    _require_range("block_tables", tables, num_blocks)
    _require_range("logits_rows", batch.logits_rows, tokens)
    _require_range("positions", batch.positions, 2**31)
    starts, contexts = batch.query_start.numpy(), batch.context_lens.numpy()
    query_lens = starts[1:] - starts[:-1]
    if starts[0] != 0 or starts[-1] != tokens or (query_lens < 1).any():
        raise ValueError(f"query_start must ascend from 0 to {tokens}")
    if (contexts < query_lens).any() or contexts.max(initial=0) > tables.shape[1] * block_size:
        raise ValueError("context_lens must cover the queries and fit into block_tables")


def _require_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} [{size}], not {tensor.dtype} {list(tensor.shape)}")


def _require_range(name: str, tensor: Tensor, end: int) -> None:
    values = tensor.numpy()
    if values.size and (values.min() < 0 or values.max() >= end):
        raise ValueError(f"{name} holds {values.min()} .. {values.max()}, but must stay within 0 .. {end - 1}")
