"""Packers, bit for bit, against a packer that sets one bit at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.formats.packing import num_words, pack, pack_awq, unpack, unpack_awq


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def pack_by_bits(codes: list[int], bits: int, *, padded: bool = False) -> list[int]:
    """Code i, bit j goes to bit i * bits + j of the stream (padded: to its slot of a word), one bit at a time."""
    per_word = 32 // bits
    words: dict[int, int] = {}
    for i, code in enumerate(codes):
        for j in range(bits):
            word, place = (i // per_word, i % per_word * bits + j) if padded else divmod(i * bits + j, 32)
            words[word] = words.get(word, 0) | (code >> j & 1) << place
    return [signed(words[word]) for word in sorted(words)]


def codes_of(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_packed_words_equal_those_set_bit_by_bit(bits: int, count: int, rows: int, seed: int) -> None:
    codes = codes_of(bits, rows, count, seed=seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [pack_by_bits(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count), codes)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_padded_words_equal_those_set_bit_by_bit(bits: int, count: int, seed: int) -> None:
    codes = codes_of(bits, 2, count, seed=seed)
    words = pack(codes, bits, padded=True)
    assert words.tolist() == [pack_by_bits(row, bits, padded=True) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count, padded=True), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_along_rows_is_packing_the_transpose_along_columns(bits: int) -> None:
    codes = codes_of(bits, 45, 3)
    words = pack(codes, bits, 0)
    assert torch.equal(words, pack(codes.T, bits, 1).T)
    assert words.is_contiguous()
    assert torch.equal(unpack(words, bits, 45, 0), codes)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x55555555]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, [0x77777777]),
        (8, [0x7F7F7F7F]),
    ],
)
def test_symmetric_zeros_of_gptq_v1_are_the_known_words(bits: int, words: list[int]) -> None:
    codes = torch.full((1, len(words) * 32 // bits), 2 ** (bits - 1) - 1)
    assert pack(codes, bits).tolist() == [[signed(word) for word in words]]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0xAAAAAAAA]),
        (3, [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x88888888]),
        (8, [0x80808080]),
    ],
)
def test_symmetric_zeros_of_gptq_v2_are_the_known_words(bits: int, words: list[int]) -> None:
    codes = torch.full((1, len(words) * 32 // bits), 2 ** (bits - 1))
    assert pack(codes, bits).tolist() == [[signed(word) for word in words]]


def test_awq_word_holds_columns_0_2_4_6_1_3_5_7_from_its_lowest_nibble() -> None:
    assert pack_awq(torch.arange(8, dtype=torch.uint8)[None]).tolist() == [[0x75316420]]
    assert pack_awq(torch.arange(15, 7, -1, dtype=torch.uint8)[None]).tolist() == [[signed(0x8ACE9BDF)]]


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 4), words=st.integers(0, 5), seed=st.integers(0, 99))
def test_awq_unpacking_undoes_packing(rows: int, words: int, seed: int) -> None:
    codes = codes_of(4, rows, words * 8, seed=seed)
    packed = pack_awq(codes)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_awq(packed), codes)


def test_the_number_of_words_is_what_packing_gives() -> None:
    for bits in range(1, 9):
        for count in range(1, 70):
            codes = codes_of(bits, 1, count)
            assert num_words(count, bits) == pack(codes, bits).shape[1]
            assert num_words(count, bits, padded=True) == pack(codes, bits, padded=True).shape[1]


def test_codes_too_wide_for_their_field_are_an_assertion() -> None:
    with pytest.raises(AssertionError, match="wider than 3 bits"):
        pack(torch.tensor([[8]]), 3)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (8, 1), (1, 1), (3, 5), (16, 64)])
def test_awq_nibbles_of_any_shape_however_it_lies_in_memory_come_back(shape: tuple[int, int]) -> None:
    rows, words = shape
    codes = codes_of(4, rows, words * 8)
    for stored in (codes, codes.T.contiguous().T):
        packed = pack_awq(stored)
        assert packed.is_contiguous()
        assert packed.shape == shape
        assert torch.equal(unpack_awq(packed), codes)
        assert torch.equal(unpack_awq(packed.T.contiguous().T), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 32), (32, 1), (5, 64), (64, 3)])
def test_codes_of_whole_bytes_come_back_from_transposed_memory(bits: int, shape: tuple[int, int]) -> None:
    codes = codes_of(bits, *shape)
    for dim in (0, 1):
        words = pack(codes, bits, dim)
        assert torch.equal(pack(codes.T.contiguous().T, bits, dim), words)
        assert torch.equal(unpack(words.T.contiguous().T, bits, shape[dim], dim), codes)
