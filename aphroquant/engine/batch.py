"""What one forward needs to know: which tokens, whose they are, and where their keys and values live."""

from __future__ import annotations

from collections.abc import Sequence as Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from aphroquant.engine.sequence import Sequence


class BatchLayout(Protocol):
    """The part of a ForwardBatch that attention needs (see there)."""

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor


@dataclass(slots=True)
class ForwardBatch:
    """T tokens of S sequences, packed; R of the rows need logits. Contiguous CPU tensors, int32 unless said.

    The tokens of one sequence are consecutive positions, so that query i of sequence s has the position
    context_lens[s] - query_len + i. Every sequence has at least one token. Entries of block_tables past a sequence's
    blocks are 0 and mean nothing.
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] int64: block * block_size + offset, where the token's key and value go
    query_start: Tensor  # [S + 1]: rows query_start[s] .. query_start[s + 1] belong to sequence s
    context_lens: Tensor  # [S]: tokens in the cache once this step's are stored
    block_tables: Tensor  # [S, max_blocks]
    logits_rows: Tensor  # [R]: ascending rows whose logits are needed

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]


def pack(step: Collection[tuple[Sequence, int]], block_size: int) -> ForwardBatch:
    """The batch of one step: sequences and how many of their tokens to compute, in the order given.

    Sequences that have all their tokens computed then need the logits of their last row.
    """
    if all(count == 1 for _, count in step):
        sequences = [sequence for sequence, _ in step]
        tokens = [sequence.token_ids[sequence.num_computed] for sequence in sequences]
        return _pack_single(sequences, [sequence.num_computed for sequence in sequences], tokens, block_size)
    num_tokens = sum(count for _, count in step)
    token_ids = np.empty(num_tokens, np.int32)
    positions = np.empty(num_tokens, np.int32)
    slots = np.empty(num_tokens, np.int64)
    starts = np.zeros(len(step) + 1, np.int32)
    context_lens = np.empty(len(step), np.int32)
    tables = _tables([sequence for sequence, _ in step])
    logits_rows = []
    row = 0
    for index, (sequence, count) in enumerate(step):
        first, end = sequence.num_computed, sequence.num_computed + count
        rows = slice(row, row + count)
        row += count
        token_ids[rows] = sequence.token_ids[first:end]
        positions[rows] = own = np.arange(first, end)
        slots[rows] = sequence.block_table[own // block_size].astype(np.int64) * block_size + own % block_size
        starts[index + 1] = row
        context_lens[index] = end
        if end == len(sequence.token_ids):
            logits_rows.append(row - 1)
    return ForwardBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        query_start=torch.from_numpy(starts),
        context_lens=torch.from_numpy(context_lens),
        block_tables=torch.from_numpy(tables),
        logits_rows=torch.tensor(logits_rows, dtype=torch.int32),
    )


def pack_ahead(sequences: Collection[Sequence], block_size: int) -> ForwardBatch:
    """One token behind the last known one of each sequence. What it is nobody knows yet: token_ids are 0."""
    return _pack_single(sequences, [len(s.token_ids) for s in sequences], [0] * len(sequences), block_size)


def _pack_single(
    sequences: Collection[Sequence], positions: list[int], tokens: list[int], block_size: int
) -> ForwardBatch:
    """The same for one token of each sequence: the step that is taken most often, in a fifth of the time."""
    pairs = list(zip(sequences, positions, strict=True))
    slots = [
        sequence.blocks[position // block_size] * block_size + position % block_size for sequence, position in pairs
    ]
    own = np.array(positions, np.int32)
    complete = [row for row, (sequence, position) in enumerate(pairs) if position + 1 >= len(sequence.token_ids)]
    return ForwardBatch(
        token_ids=torch.from_numpy(np.array(tokens, np.int32)),
        positions=torch.from_numpy(own),
        slot_mapping=torch.from_numpy(np.array(slots, np.int64)),
        query_start=torch.from_numpy(np.arange(len(sequences) + 1, dtype=np.int32)),
        context_lens=torch.from_numpy(own + np.int32(1)),
        block_tables=torch.from_numpy(_tables(sequences)),
        logits_rows=torch.tensor(complete, dtype=torch.int32),
    )


def _tables(sequences: Collection[Sequence]) -> npt.NDArray[np.int32]:
    tables = np.zeros((len(sequences), max(len(sequence.blocks) for sequence in sequences)), np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.blocks)] = sequence.block_table[: len(sequence.blocks)]
    return tables
