"""Codes of a large codebook sorted by slices of its entries: what source/aqlm_sliced.cu reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_ENTRIES = 8192
MAX_CHUNK_GROUPS = 512
GROUP_ROWS = 8
WINDOW_ROWS = 64  # within which rows are sorted by how many codes they have
_POSITIONS = 4  # of a step
_QUAD_STEPS, QUAD_BYTES = 4, 384
_QUADS_AHEAD = 8  # that may be read behind the last
_CLASSES = 8  # of banks that an entry's 16 bytes lie in


@dataclass(frozen=True)
class SlicedCodes:
    """Units are pairs (slice, chunk of input groups) in order; `offsets` and `row_numbers` as in aqlm_sliced.cu."""

    chunks: int
    chunk_groups: int
    quads: Tensor  # uint8 [quads, 384]
    offsets: Tensor  # int32 [units, row groups + 1]
    row_numbers: Tensor  # int32 [units, row groups, 8]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.quads, self.offsets, self.row_numbers))


class _Rows(NamedTuple):
    """Of each unit: row numbers in sorted order [U, rows], and the place of each row there [rows, U]."""

    numbers: Tensor
    places: Tensor


def slice_codes(entries: Tensor, num_entries: int) -> SlicedCodes:
    """`entries` int64 [N, groups, M]: of all codebooks one behind the other, of each group of inputs."""
    rows, groups, books = entries.shape
    chunks = -(-groups // MAX_CHUNK_GROUPS)
    chunk_groups = -(-groups // chunks)
    units = -(-num_entries // SLICE_ENTRIES) * chunks
    padded_rows = -(-rows // WINDOW_ROWS) * WINDOW_ROWS
    group = torch.arange(groups, device=entries.device).repeat_interleave(books)
    flat = entries.reshape(rows, -1)
    unit = flat // SLICE_ENTRIES * chunks + group // chunk_groups  # [N, P]
    counts = torch.zeros(padded_rows, units, dtype=torch.int64, device=entries.device)
    counts[:rows].scatter_add_(1, unit, torch.ones_like(unit))
    sorted_rows = _sort_rows(counts)
    longest = counts.T.gather(1, sorted_rows.numbers).view(units, -1, GROUP_ROWS).amax(2)  # [U, row groups]
    steps = (-(-longest // _POSITIONS)).clamp(min=1)
    ends = steps.flatten().cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    starts = offsets[:-1].view(units, -1)
    order = _positions(flat, unit, counts, sorted_rows)
    place = sorted_rows.places[:rows].gather(1, unit)  # [N, P]: of the row, in its unit
    step = starts[unit, place // GROUP_ROWS] + order // _POSITIONS
    lane = order % _POSITIONS * GROUP_ROWS + place % GROUP_ROWS
    words = flat % SLICE_ENTRIES | (group % chunk_groups) << 13
    quads = _write(words, step, lane, int(offsets[-1]), chunk_groups)
    bounds = torch.cat([starts, offsets[starts.shape[1] :: starts.shape[1]][:, None]], 1)
    return SlicedCodes(
        chunks,
        chunk_groups,
        quads,
        bounds.to(torch.int32).contiguous(),
        sorted_rows.numbers.view(units, -1, GROUP_ROWS).to(torch.int32).contiguous(),
    )


def _sort_rows(counts: Tensor) -> _Rows:
    """By falling counts [rows, U], within windows."""
    rows, units = counts.shape
    windows = counts.T.reshape(units, -1, WINDOW_ROWS)
    order = windows.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, rows, WINDOW_ROWS, device=counts.device)[:, None]
    numbers = (order + first).view(units, rows)
    places = torch.empty_like(numbers).scatter_(
        1, numbers, torch.arange(rows, device=counts.device).expand(units, rows)
    )
    return _Rows(numbers, places.T.contiguous())


def _positions(flat: Tensor, unit: Tensor, counts: Tensor, sorted_rows: _Rows) -> Tensor:
    """Each code's position in its row's list [N, P]: row i of a group has at position p a code of bank (p + i) % 8, or
    else of the next bank that it has any of, so that the rows of a group seldom meet in a bank."""
    rows, units = counts.shape
    banks = flat % _CLASSES
    keys = unit * _CLASSES + banks  # [N, P]
    ranks = _ranks(keys)
    left = torch.zeros(rows, units * _CLASSES, dtype=torch.int32, device=flat.device)
    left[: flat.shape[0]].scatter_add_(1, keys, torch.ones_like(keys, dtype=torch.int32))
    left = left.view(-1, _CLASSES)  # [rows * U, 8]
    total, most = counts.flatten(), int(left.max())
    chosen = torch.zeros(rows * units * _CLASSES, max(most, 1), dtype=torch.int16, device=flat.device)
    taken = torch.zeros_like(left)
    first = (sorted_rows.places % GROUP_ROWS).flatten()
    lists = torch.arange(rows * units, device=flat.device)
    turn = torch.arange(_CLASSES, device=flat.device)
    for position in range(int(total.max())):
        wanted = (first[:, None] + (turn + position)) % _CLASSES
        bank = wanted.gather(1, (left.gather(1, wanted) > 0).int().argmax(1, keepdim=True))[:, 0]
        active = (total > position).int()
        slot = lists * _CLASSES + bank
        rank = taken.view(-1)[slot].long()
        place = slot * chosen.shape[1] + torch.where(active > 0, rank, rank.clamp(max=chosen.shape[1] - 1))
        kept = chosen.view(-1)[place]
        chosen.view(-1)[place] = torch.where(active > 0, torch.full_like(kept, position), kept)
        taken.view(-1)[slot] += active
        left.view(-1)[slot] -= active
    own = torch.arange(flat.shape[0], device=flat.device)[:, None] * (units * _CLASSES) + keys
    return chosen[own, ranks].long()


def _ranks(keys: Tensor) -> Tensor:
    """How many of the same key stand in front of each in its row: [N, P]."""
    order = keys.argsort(dim=1, stable=True)
    ordered = keys.gather(1, order)
    index = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    starts = torch.where(torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True), index, 0)
    ranks = index - starts.cummax(1).values
    return torch.empty_like(keys).scatter_(1, order, ranks)


def _write(words: Tensor, step: Tensor, lane: Tensor, num_steps: int, padding: int) -> Tensor:
    """Quads of 4 steps: low halves [lane][step], then high bytes [lane][step]. Unused places have the zero input."""
    num_quads = -(-num_steps // _QUAD_STEPS) + _QUADS_AHEAD
    places = torch.full((num_quads, 32, _QUAD_STEPS), padding << 13, dtype=torch.int32, device=words.device)
    index = (step // _QUAD_STEPS * 32 + lane) * _QUAD_STEPS + step % _QUAD_STEPS
    places.view(-1)[index.flatten()] = words.flatten().to(torch.int32)
    low = (places & 0xFFFF).to(torch.int32).view(torch.int16)[..., ::2].contiguous().view(torch.uint8)
    high = (places >> 16).to(torch.uint8)
    return torch.cat([low.view(num_quads, -1), high.view(num_quads, -1)], 1)
