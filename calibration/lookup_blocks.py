"""Lookup schemes' tables and blocks: sorted tables with the borders between their entries, and weights as blocks."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.schemes import TABLES, LookupScheme
from aphroquant.schemes.lookup import TableName

_BOTH_ZEROS = ("fp4",)  # bitsandbytes gives the tiniest positive numbers the second of the two
_HALF_TO_EVEN = ("e2m1",)  # tables of floating-point numbers: a tie goes to the entry whose last bit is zero


class Table(NamedTuple):
    """Entries in ascending order: `values` float32 [V], `codes` float32 [V], `boundaries` float32 [V - 1].

    A number x becomes entry i if boundaries[i - 1] < x <= boundaries[i].
    """

    values: Tensor
    codes: Tensor
    boundaries: Tensor

    @property
    def top(self) -> float:
        """The largest magnitude."""
        return max(float(self.values[-1]), -float(self.values[0]))

    @property
    def is_even(self) -> bool:
        """Whether it holds the negative of every entry."""
        return bool(torch.equal(self.values, -self.values.flip(0)))


@cache
def table_of(name: TableName, device: torch.device) -> Table:
    entries = sorted((value, code) for code, value in enumerate(TABLES[name]))
    if name not in _BOTH_ZEROS:
        entries = list({value: (value, code) for value, code in reversed(entries)}.values())[::-1]
    values = torch.tensor([value for value, _ in entries], dtype=torch.float32)
    codes = torch.tensor([float(code) for _, code in entries])
    boundaries = (values[1:] + values[:-1]) / 2
    if name in _HALF_TO_EVEN:
        upper_is_even = codes[1:] % 2 == 0
        below = torch.nextafter(boundaries, torch.full_like(boundaries, -torch.inf))
        boundaries = torch.where(upper_is_even, below, boundaries)
    return Table(values.to(device), codes.to(device), boundaries.to(device))


def split_blocks(matrix: Tensor, scheme: LookupScheme) -> Tensor:
    """[N, K] -> [B, block size], float32, the last block (of each row, or of all) filled up with zeros."""
    size = scheme.block_size
    rows = matrix.float().reshape(1, -1) if scheme.flattened else matrix.float()
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)


def join_blocks(blocks: Tensor, scheme: LookupScheme, shape: tuple[int, int]) -> Tensor:
    """[B, block size] -> [N, K]; inverse of split_blocks."""
    num_rows, width = (1, shape[0] * shape[1]) if scheme.flattened else shape
    return blocks.reshape(num_rows, -1)[:, :width].reshape(shape)
