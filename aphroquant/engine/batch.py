"""What one forward needs to know: which tokens, whose they are, and where their keys and values live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    context are 0 and mean nothing.
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
