"""Nibbles and exponents, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import fp4


def test_the_first_of_two_codes_is_in_the_low_nibble_or_in_the_high_one() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert fp4.pack_nibbles(codes).tolist() == [[0x21, 0x0F]]
    assert fp4.pack_nibbles(codes, low_first=False).tolist() == [[0x12, 0xF0]]


@pytest.mark.parametrize("low_first", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 6), (2, 3, 32), (0, 8)], ids=str)
def test_unpacking_undoes_packing(low_first: bool, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = fp4.pack_nibbles(codes, low_first=low_first)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(fp4.unpack_nibbles(packed, low_first=low_first), codes)


def test_exponents_mean_the_same_whichever_dtype_names_them() -> None:
    stored = torch.arange(255, dtype=torch.uint8)
    expected = [2.0 ** (byte - 127) for byte in range(255)]
    assert fp4.exponent_scales(stored).double().tolist() == expected
    assert fp4.exponent_scales(stored.view(torch.float8_e8m0fnu)).double().tolist() == expected


@pytest.mark.parametrize("value", [1.0, 3.0, 2688 / 0.037, 1e-38, 3e38, 1.1754944e-38])
def test_a_divisor_comes_back_to_the_last_bit(value: float) -> None:
    stored = torch.tensor([value])
    scale = fp4.factor_of_divisor("layer", "global", stored)
    assert scale.dtype == torch.float64
    assert torch.equal(fp4.stored_divisor("x", "layer", "global", scale).reshape(1), stored)


@pytest.mark.parametrize("value", [1.0, 3.0, 0.037 / 2688, 0.0, 1.1754944e-38, 1e-45])
def test_a_factor_comes_back_to_the_last_bit(value: float) -> None:
    stored = torch.tensor([value])
    scale = fp4.factor("layer", "global", stored)
    assert torch.equal(fp4.stored_factor("x", "layer", "global", scale).reshape(1), stored)


@pytest.mark.parametrize("divisor", [3.0, 2688 / 0.037, 0.7, 1e30])
def test_a_divisor_as_a_factor_is_rounded_once(divisor: float) -> None:
    scale = fp4.factor_of_divisor("layer", "global", torch.tensor(divisor))
    stored = fp4.stored_factor("x", "layer", "global", scale)
    assert float(stored) == pytest.approx(float(scale), rel=2**-24)
    assert float(stored) == float(scale.float())


@pytest.mark.parametrize("divisor", [3e38, math.pi * 1e-40])
def test_a_divisor_without_a_factor_in_range_is_refused(divisor: float) -> None:
    scale = fp4.factor_of_divisor("layer", "global", torch.tensor(divisor))
    with pytest.raises(UsageError, match=r"layer: global = .* is beyond the float32 that x needs"):
        fp4.stored_factor("x", "layer", "global", scale)


def test_an_infinite_divisor_makes_zeros() -> None:
    scale = fp4.factor_of_divisor("layer", "global", torch.tensor(math.inf))
    assert float(scale) == 0
    assert float(fp4.stored_divisor("x", "layer", "global", scale)) == math.inf


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_divisors_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"layer\.global = .* must be positive"):
        fp4.factor_of_divisor("layer", "global", torch.tensor([value]))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_factors_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"layer\.global = .* must be finite and not negative"):
        fp4.factor("layer", "global", torch.tensor([value]))
