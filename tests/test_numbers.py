"""Questions about all numbers of a tensor: the same answers compiled and in torch, for every code and every width."""

from __future__ import annotations

import json

import pytest
import torch

from aphroquant.numbers import is_finite, is_finite_in_torch, largest_byte, largest_magnitude, same_bytes

EIGHT_BITS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_every_byte_of_an_8_bit_float_is_judged_as_its_value(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    expected = values.float().isfinite().tolist()
    assert [is_finite(values[code : code + 1]) for code in range(256)] == expected
    assert [is_finite_in_torch(values[code : code + 1]) for code in range(256)] == expected
    assert is_finite(values[:0])
    assert json.dumps(expected).count("false") > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_of_a_16_bit_float_is_judged_as_its_value(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    expected = values.isfinite().tolist()
    assert [is_finite(value) for value in values.view(-1, 1)] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    for count in (1, 15, 16, 17, 300):
        for place in {0, count // 2, count - 1}:
            values = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
            assert is_finite(values)
            values[place] = bad
            assert not is_finite(values)


def test_numbers_that_do_not_lie_together_are_all_looked_at() -> None:
    matrix = torch.zeros(40, 30, dtype=torch.bfloat16)
    matrix[7, 3] = torch.inf
    assert not is_finite(matrix.T)
    assert not is_finite(matrix[:, 3])
    assert is_finite(matrix[:, 4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_magnitude_is_that_of_torch(dtype: torch.dtype) -> None:
    values = torch.randn(37, 23, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(largest_magnitude(values), values.abs().amax().float())
    assert torch.equal(largest_magnitude(-values.T), values.abs().amax().float())
    assert torch.equal(largest_magnitude(torch.full((3,), -1e-7, dtype=dtype)), torch.tensor(1e-7, dtype=dtype).float())
    assert largest_magnitude(values[:0]).item() == 0


def test_the_largest_byte_is_found_in_any_order_of_memory() -> None:
    codes = torch.arange(200, dtype=torch.uint8).view(20, 10)
    assert largest_byte(codes) == 199
    assert largest_byte(codes.T[:3]) == 192
    assert largest_byte(codes[:0]) == 0


@pytest.mark.parametrize("begin", [0, 1, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 65])
def test_one_other_bit_anywhere_makes_other_bytes(begin: int, count: int) -> None:
    whole = torch.arange(80, dtype=torch.uint8)
    ours, theirs = whole[begin : begin + count], whole[begin : begin + count].clone()
    assert same_bytes(ours, theirs)
    for place in range(count):
        theirs[place] ^= 1
        assert not same_bytes(ours, theirs)
        theirs[place] ^= 1


def test_bytes_are_compared_and_not_numbers() -> None:
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bytes(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert same_bytes(torch.ones(3, 4).half().T, torch.ones(4, 3).half())
