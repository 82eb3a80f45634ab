"""HQQ's packing: a byte (or word) holds codes of rows that are far apart, not of neighbours.

The rows of a matrix are cut into as many equal parts as a byte has fields; field 0, the highest, holds the first part.
Three bits are packed ten to a word of 32, the rows filled up with zeros to a multiple of ten.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """`fields` codes of `bits` each in one number of `dtype`, the first highest and the last at bit 0."""

    name: str
    bits: int
    fields: int
    dtype: torch.dtype


PACKINGS = {
    packing.name: packing
    for packing in (
        Packing("8bit_u8", 8, 1, torch.uint8),
        Packing("4bit_u8", 4, 2, torch.uint8),
        Packing("3bit_32", 3, 10, torch.int32),
        Packing("2bit_u8", 2, 4, torch.uint8),
        Packing("1bit_u8", 1, 8, torch.uint8),
    )
}
_NAMES = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
BITS = tuple(_NAMES)


def packing_of(bits: int) -> Packing:
    """The packing that the library uses for codes of that width, one of `BITS`."""
    return PACKINGS[_NAMES[bits]]


def pack(codes: Tensor, packing: Packing) -> Tensor:
    """Codes [R, C] as [ceil(R / fields), C]; but for words of ten codes, `fields` divides R."""
    rows = torch.nn.functional.pad(codes.to(packing.dtype), (0, 0, 0, -codes.shape[0] % packing.fields))
    parts = rows.reshape(packing.fields, -1, codes.shape[1])
    packed = torch.zeros_like(parts[0])
    for field, part in enumerate(parts):
        packed |= part << _shift(packing, field)
    return packed


def unpack(packed: Tensor, packing: Packing, num_rows: int) -> Tensor:
    """The codes uint8 [num_rows, C]. Inverse of `pack`."""
    mask = 2**packing.bits - 1
    parts = [((packed >> _shift(packing, field)) & mask).to(torch.uint8) for field in range(packing.fields)]
    return torch.cat(parts)[:num_rows]


def _shift(packing: Packing, field: int) -> int:
    return packing.bits * (packing.fields - 1 - field)
