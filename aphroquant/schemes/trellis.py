"""Trellis codes: EXL3, QTIP's bitshift trellis with computed codebooks.

The weight is rotated by Hadamard matrices of 128 channels on both sides, and cut into tiles of 16 x 16. A tile is a
ring of 256 * bits bits. Number i of the ring is a function of the 16 bits that end where its own bits end: each number
takes `bits` new bits and shares the others with its predecessors, so that one of 2**16 values costs `bits` bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.schemes.base import BaseScheme

CodebookName = Literal["3inst", "mcg", "mul1"]

TILE = 16
ROTATED = 128  # channels that one Hadamard matrix mixes
MAX_BITS = 8
_STATE_BITS = 16
_WORD_BITS = 32
_NUMBERS = TILE * TILE
_ROWS_AT_ONCE = 2048  # of tiles, while their states are looked up: bounds the memory for a large layer
_MULTIPLIERS: Mapping[CodebookName, int] = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_ADDEND = 64248484  # of 3inst
_KEPT, _FLIPPED = 0x8FFF, 0x3B60  # make a float16 between 1/8 and 2, of either sign, of 16 random bits
_BYTE_SCALE, _BYTE_OFFSET = 0x1EEE, 0xC931  # float16: 1 / 147.7, and what centres the sum of four bytes plus 1024


@dataclass(frozen=True)
class TrellisScheme(BaseScheme):
    """W = (diag(input_scales) H R H diag(output_scales)).T, H normalised Hadamard matrices, R the rings' numbers.

    Tensors: rings int32 [K/16, N/16, 8 * bits], the highest bit of a word first; input_scales float16 [K];
    output_scales float16 [N]. Half-integer `bits` alternate between one less and one more half.
    """

    bits: float
    codebook: CodebookName

    def __post_init__(self) -> None:
        whole = self.bits in range(1, MAX_BITS + 1)
        if not whole and (self.bits not in (1.5, 2.5, 3.5) or self.codebook != "mul1"):
            raise UsageError(f"bits = {self.bits} must be 1 to {MAX_BITS}, or 1.5, 2.5 or 3.5 with the codebook mul1")
        if self.codebook not in _MULTIPLIERS:
            raise UsageError(f"codebook = {self.codebook!r} must be one of {', '.join(_MULTIPLIERS)}")

    def __str__(self) -> str:
        return f"trellis {self.bits:g}-bit {self.codebook}"

    @property
    def words(self) -> int:
        """32-bit words of a ring."""
        return int(_NUMBERS * self.bits) // _WORD_BITS

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        if out_features % ROTATED or in_features % ROTATED:
            raise InputError(f"{[out_features, in_features]} is no multiple of {self}'s {ROTATED} channels")
        return {
            "rings": (in_features // TILE, out_features // TILE, self.words),
            "input_scales": (in_features,),
            "output_scales": (out_features,),
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"rings": torch.int32, "input_scales": torch.float16, "output_scales": torch.float16}

    def rotated(self, rings: Tensor) -> Tensor:
        """R, float16 [K, N]: the numbers of the rings, in their places."""
        words = rings.reshape(-1, self.words)
        numbers = torch.cat([self._numbers(part) for part in torch.split(words, _ROWS_AT_ONCE)])  # [tiles, 256]
        tiles = torch.empty_like(numbers)
        tiles[:, _places().to(rings.device)] = numbers
        down, across, _ = rings.shape
        return tiles.view(down, across, TILE, TILE).transpose(1, 2).reshape(down * TILE, across * TILE)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype) -> Tensor:
        matrix = _hadamard(ROTATED).to(tensors["rings"].device, work)
        weight = self.rotated(tensors["rings"]).to(work)  # [K, N]
        weight = (matrix @ weight.view(-1, ROTATED, shape[0])).view(shape[1], shape[0])
        weight = weight * tensors["input_scales"].to(work)[:, None]
        weight = (weight.view(shape[1], -1, ROTATED) @ matrix).view(shape[1], shape[0])
        scaled: Tensor = weight * tensors["output_scales"].to(work)
        return scaled.T.contiguous()

    def _numbers(self, words: Tensor) -> Tensor:
        """float16 [tiles, 256], in the order of the rings int32 [tiles, words]."""
        unsigned = words.long() & (2**_WORD_BITS - 1)
        begin = self._ends().to(words.device) - _STATE_BITS  # of each state; before the ring's start: from its end
        first = begin.div(_WORD_BITS, rounding_mode="floor")
        pairs = unsigned[:, first % self.words] << _WORD_BITS | unsigned[:, (first + 1) % self.words]
        states = pairs >> (2 * _WORD_BITS - _STATE_BITS - begin % _WORD_BITS) & (2**_STATE_BITS - 1)
        return _codebook(self.codebook).to(words.device)[states]

    def _ends(self) -> Tensor:
        """int64 [256]: the bit of the ring after the last one of each number. Odd numbers take the larger half."""
        numbers = torch.arange(_NUMBERS)
        pairs = (numbers + 1) // 2 * int(2 * self.bits)
        return pairs + torch.where(numbers % 2 == 0, int(self.bits), 0)


@cache
def _codebook(name: CodebookName) -> Tensor:
    """float16 [65536]: the number that each state stands for."""
    products = torch.arange(2**_STATE_BITS) * _MULTIPLIERS[name] + (_ADDEND if name == "3inst" else 0)
    products &= 2**32 - 1
    if name == "mul1":
        bytes_ = torch.stack([products >> shift & 255 for shift in (0, 8, 16, 24)])
        scale, offset = _float16(torch.tensor([_BYTE_SCALE, _BYTE_OFFSET])).float()
        return torch.add(offset, (bytes_.sum(0) + 1024).float() * scale).half()  # exact before it is rounded
    low, high = (_float16((products >> shift & _KEPT) ^ _FLIPPED) for shift in (0, 16))
    return (low.float() + high.float()).half()


def _float16(patterns: Tensor) -> Tensor:
    """The numbers that bit patterns 0 .. 65535 stand for."""
    return patterns.to(torch.uint16).view(torch.float16)


@cache
def _places() -> Tensor:
    """int64 [256]: where each number of a ring stands in its tile, row by row.

    The order is that of the registers of a tensor core: 8 numbers a lane, of two columns and four rows.
    """
    number = torch.arange(_NUMBERS)
    lane, register = number // 8, number % 8
    row = lane % 4 * 2 + register % 2 + register // 2 % 2 * 8
    column = lane // 4 + register // 4 * 8
    return row * TILE + column


@cache
def _hadamard(size: int) -> Tensor:
    """float64 [size, size], Sylvester's, normalised."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.mul(size**-0.5)
