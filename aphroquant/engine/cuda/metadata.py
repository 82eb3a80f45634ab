"""What the kernels need to know of a batch, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.kernels.cuda.host_copies import to_device

MakeTiles = Callable[[Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True)
class StepInputs:
    """The tokens of a step: int32 [T], slots int64 [T]. Sequences before `num_decoding` have one token each.

    `tiles` are those of the other sequences, for PagedPrefill; the rest is as in ForwardBatch, on the device.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    block_tables: Tensor
    num_decoding: int
    splits: int
    query_start: Tensor | None = None
    tiles: Tensor | None = None
    logits_rows: Tensor | None = None  # None: every row

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def is_decode_only(batch: ForwardBatch) -> bool:
    """Whether every sequence has one token."""
    return batch.num_tokens == batch.num_sequences


def num_leading_decodes(query_lens: Sequence[int]) -> int:
    """How many sequences at the beginning have one token: these go through the decode kernel."""
    return next((index for index, length in enumerate(query_lens) if length != 1), len(query_lens))


def mixed_inputs(
    batch: ForwardBatch, make_tiles: MakeTiles, splits_for: Callable[[int], int], device: torch.device
) -> StepInputs:
    """The inputs of any batch, copied to the device."""
    query_lens = np.diff(batch.query_start.numpy()).tolist()
    num_decoding = num_leading_decodes(query_lens)
    tiles = make_tiles(query_lens[num_decoding:], batch.context_lens[num_decoding:].tolist())
    tiles[:, 0] += num_decoding

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return StepInputs(
        token_ids=moved(batch.token_ids),
        positions=moved(batch.positions),
        slots=moved(batch.slot_mapping),
        context_lens=moved(batch.context_lens),
        block_tables=moved(batch.block_tables),
        num_decoding=num_decoding,
        splits=splits_for(max(num_decoding, 1)),
        query_start=moved(batch.query_start),
        tiles=moved(tiles),
        logits_rows=moved(batch.logits_rows),
    )


class DecodeBuffers:
    """Fixed memory on the device for decode steps, which captured graphs read.

    A step's numbers travel in one copy; block tables only when one has changed since the last step. The host waits for
    neither, nor for the step before.
    """

    def __init__(self, max_sequences: int, table_width: int, device: torch.device) -> None:
        self._max = max_sequences
        self._device = torch.zeros(5 * max_sequences, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_sequences, table_width, dtype=torch.int32, device=device)
        self._known: npt.NDArray[np.int32] = np.zeros((max_sequences, table_width), np.int32)

    def inputs(self, bucket: int, splits: int) -> StepInputs:
        """Views of the memory for a step of `bucket` sequences."""
        slots = self._device[: 2 * self._max].view(torch.int64)
        token_ids, positions, context_lens = self._device[2 * self._max :].view(3, self._max)
        return StepInputs(
            token_ids=token_ids[:bucket],
            positions=positions[:bucket],
            slots=slots[:bucket],
            context_lens=context_lens[:bucket],
            block_tables=self._tables[:bucket],
            num_decoding=bucket,
            splits=splits,
        )

    def fill(self, batch: ForwardBatch, bucket: int, tokens: Tensor | None = None) -> None:
        """Take over a decode-only batch, padded to the bucket with sequences that store nothing and see nothing.

        `tokens`, int32 [S] on the device, instead of those of the batch.
        """
        count = batch.num_sequences
        numbers = np.zeros(5 * self._max, np.int32)
        slots = numbers[: 2 * self._max].view(np.int64)
        slots[:count] = batch.slot_mapping.numpy()
        slots[count:bucket] = -1
        rows = numbers[2 * self._max :].reshape(3, self._max)
        for row, source in zip(rows, (batch.token_ids, batch.positions, batch.context_lens), strict=True):
            row[:count] = source.numpy()
        self._device.copy_(to_device(torch.from_numpy(numbers), self._device.device))
        if tokens is not None:
            self._device[2 * self._max :][:count] = tokens
        tables = batch.block_tables.numpy()
        width = tables.shape[1]
        known = self._known[:count, :width]
        changed = np.flatnonzero((known != tables).any(axis=1))
        if len(changed):
            known[changed] = tables[changed]
            first, end = int(changed[0]), int(changed[-1]) + 1
            self._tables[first:end, :width] = to_device(torch.from_numpy(tables[first:end]), self._tables.device)
