"""The order in which a weight's columns are packed: whole groups, so that one scale serves whole matrix steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEP = 16  # columns of one matrix instruction
_SMALL_GROUPS = (64, 32, 16)


@dataclass(frozen=True)
class ColumnOrder:
    """Packed columns in groups of `group_size`, all of one length. `columns` is None for the order they have."""

    columns: Tensor | None  # int32 [padded]: source column, -1 for padding
    padded: int
    group_size: int
    repeats: int  # packed groups for each group of the weight

    def spread(self, values: Tensor) -> Tensor:
        """[N, G] -> [N, packed groups], zeros for groups of nothing but padding."""
        if self.repeats > 1:
            values = values.repeat_interleave(self.repeats, 1)
        groups = -(-self.padded // self.group_size)
        if groups == values.shape[1]:
            return values
        spread = values.new_zeros(values.shape[0], groups)
        spread[:, : values.shape[1]] = values[:, :groups]
        return spread


def arrange_columns(
    in_features: int, num_groups: int, group_size: int | None, group_index: Tensor | None, multiple: int
) -> ColumnOrder:
    """The order for groups of `group_size` columns in a row (None: one group), or of `group_index` int64 [K].

    Groups that are no multiple of 16 columns are padded; the width is padded to `multiple`.
    """
    if num_groups == 1:
        padded = _up(in_features, multiple)
        return ColumnOrder(None, padded, padded, 1)
    size = group_size or in_features
    columns = None
    if group_index is not None:
        sizes = torch.bincount(group_index, minlength=num_groups)
        even = int(sizes.max()) == size and bool((sizes[:-1] == size).all()) and size % _STEP == 0
        size = size if even else int(sizes.max())
        columns = _grouped(group_index, sizes, _up(size, _STEP))
    elif size % _STEP:
        index = torch.arange(in_features) // size
        columns = _grouped(index, torch.bincount(index, minlength=num_groups), _up(size, _STEP))
    size = _up(size, _STEP)
    part = size if size % multiple == 0 else next(small for small in _SMALL_GROUPS if size % small == 0)
    padded = _up(in_features if columns is None else columns.shape[0], multiple)
    if columns is not None:
        columns = torch.cat([columns, columns.new_full((padded - columns.shape[0],), -1)])
    return ColumnOrder(columns, padded, part, size // part)


def _grouped(group_index: Tensor, sizes: Tensor, width: int) -> Tensor:
    """Columns by group, `width` places for each group: int32 [G * width], -1 where a group has no more."""
    order = torch.argsort(group_index, stable=True)
    groups = group_index[order]
    starts = torch.cumsum(sizes, 0) - sizes
    columns = torch.full((sizes.shape[0] * width,), -1, dtype=torch.int32, device=group_index.device)
    places = groups * width + torch.arange(order.shape[0], device=group_index.device) - starts[groups]
    columns[places] = order.to(torch.int32)
    return columns


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
