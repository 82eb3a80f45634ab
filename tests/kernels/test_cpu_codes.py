"""The compiled packers against those in torch, bit for bit, with every instruction set and in odd shapes."""

from __future__ import annotations

import pytest
import torch

from aphroquant.formats import packing
from aphroquant.kernels.cpu import codes as compiled

# Around the sides of tiles and vectors: (rows, codes of a row).
SHAPES = [(0, 0), (0, 8), (3, 0), (1, 1), (1, 7), (2, 9), (3, 33), (5, 64), (64, 32), (65, 96), (7, 511), (9, 2056)]
SHAPES += [(130, 1000), (63, 4096), (257, 514)]


def codes_of(bits: int, shape: tuple[int, int]) -> torch.Tensor:
    random = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_streams_are_those_of_torch(instruction_set: str, bits: int, shape: tuple[int, int]) -> None:
    codes = codes_of(bits, shape)
    for dim, pack in ((1, compiled.pack), (0, compiled.pack_across)):
        stored = codes if dim else codes.T
        words, union = pack(codes, bits)
        assert torch.equal(words, packing.pack_in_torch(stored, bits, dim))
        assert union < 2**bits
        assert torch.equal(packing.unpack(words, bits, shape[1], dim), stored)
        assert torch.equal(packing.unpack_in_torch(words, bits, shape[1], dim), stored)


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_words_are_unpacked_as_in_torch_also_more_than_are_needed(instruction_set: str, bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (70, 75), dtype=torch.int64).to(torch.int32)
    for count in (1, 31, 150, 75 * 32 // bits):
        assert torch.equal(compiled.unpack(words, bits, count), packing.unpack_in_torch(words, bits, count))
    for count in (1, 31, 150, 70 * 32 // bits):
        across = compiled.unpack_across(words, bits, count)
        assert torch.equal(across.T, packing.unpack_in_torch(words, bits, count, 0))


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("place", [0, 3, 8, 200, 298])
def test_a_code_that_is_too_wide_is_seen_wherever_it_is(instruction_set: str, bits: int, place: int) -> None:
    codes = torch.zeros(3, 299, dtype=torch.uint8)
    codes[2, place] = 2**bits
    assert compiled.pack(codes, bits)[1] == 2**bits
    assert compiled.pack_across(codes, bits)[1] == 2**bits


@pytest.mark.parametrize("shape", [(0, 3), (8, 1), (8, 0), (16, 255), (24, 257), (136, 40), (256, 1030)])
def test_awq_words_are_those_of_torch(instruction_set: str, shape: tuple[int, int]) -> None:
    codes = codes_of(4, shape)
    words, union = compiled.pack_awq(codes)
    assert torch.equal(words, packing.pack_awq_in_torch(codes.T))
    assert union < 16
    assert torch.equal(compiled.unpack_awq(words), codes)
    assert torch.equal(packing.unpack_awq_in_torch(words), codes.T)
    if codes.numel():
        codes[-1, -1] = 16
        assert compiled.pack_awq(codes)[1] >= 16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("count", [0, 1, 63, 1000])
def test_the_largest_masked_number_is_that_of_torch(instruction_set: str, dtype: torch.dtype, count: int) -> None:
    numbers = torch.randint(0, 2 ** (dtype.itemsize * 8 - 1), (count,), dtype=torch.int64)
    for mask in (0x7F, 0x55, 1):
        expected = int((numbers & mask).max()) if count else 0
        assert compiled.largest_masked(numbers.to(dtype), mask) == expected
