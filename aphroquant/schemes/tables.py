"""Lookup schemes' tables in ascending order, with the borders between their entries: what rounding to nearest needs."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.schemes.lookup import TABLES, TableName

E8M0_BIAS = 127
_BOTH_ZEROS = ("fp4",)  # bitsandbytes gives the tiniest positive numbers the second of the two
_HALF_TO_EVEN = ("e2m1",)  # tables of floating-point numbers: a tie goes to the entry whose last bit is zero


class Table(NamedTuple):
    """Entries in ascending order: `values` float32 [V], `codes` float32 [V], `boundaries` float32 [V - 1].

    A number x becomes entry i if boundaries[i - 1] < x <= boundaries[i].
    """

    values: Tensor
    codes: Tensor
    boundaries: Tensor

    def places(self, x: Tensor) -> Tensor:
        """The places of the entries that x becomes, int32."""
        if x.device.type != "cpu":
            return torch.bucketize(x, self.boundaries, out_int32=True)
        count = torch.zeros(x.shape, dtype=torch.int8)  # fifteen comparisons take a quarter of bucketize's time
        for boundary in self.boundaries:
            count += x > boundary
        return count.int()

    def nearest(self, x: Tensor) -> Tensor:
        """The entries that x becomes."""
        return self.values.index_select(0, self.places(x).flatten()).view(x.shape)

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


def e8m0_exponents(largest: Tensor) -> Tensor:
    """The power of two, int32, that e2m1 numbers up to `largest` get as their scale: 1.75 and more round up, so that
    the largest is coded as 3.5 to 7. Zeros get 0. As compressed-tensors chooses it."""
    mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1)
    found = exponent + (mantissa >= 0.875).int() - 3
    return torch.where(largest == 0, 0, found).clamp(-E8M0_BIAS, E8M0_BIAS)
