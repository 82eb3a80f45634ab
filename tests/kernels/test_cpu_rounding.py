"""Compiled rounding against that in torch: the same bits of codes, scales and zero points."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphroquant.calibration import fp8, rtn
from aphroquant.errors import InputError
from aphroquant.kernels.cpu import rounding
from aphroquant.schemes import FloatScheme, IntegerScheme

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Groups of every kind: ordinary, all zero, of one sign, tiny, with one large number, on the steps of a grid."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    rows = weight.shape[0]
    weight[1 % rows] = 0
    weight[2 % rows] = weight[2 % rows].abs()
    weight[3 % rows] = -weight[3 % rows].abs()
    weight[4 % rows] *= 1e-6
    weight[5 % rows, 0] = 60.0
    weight[6 % rows] = torch.randint(-8, 8, (shape[1],)) * 0.5
    weight[7 % rows] = -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, True), (4, False), (8, True), (8, False)])
def test_integers_are_those_of_torch(
    instruction_set: str, dtype: torch.dtype, scale_dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    for shape, group_size in (((9, 256), 128), ((8, 96), 32), ((11, 70), 24), ((10, 300), None), ((1, 1), 1)):
        scheme = IntegerScheme(bits, group_size, symmetric)
        weight = weight_of(shape, dtype)
        assert rounding.usable(weight, scale_dtype)
        found = rtn.solve([weight], None, scheme, scale_dtype)[0]
        expected = rtn.solve_in_torch([weight], None, scheme, scale_dtype)[0]
        assert set(found.weight.tensors) == set(expected.weight.tensors)
        for name, tensor in expected.weight.tensors.items():
            assert found.weight[name].dtype == tensor.dtype
            assert torch.equal(found.weight[name], tensor), (shape, name)
        assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
        assert found.square_sum == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
        assert found.details == expected.details


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "scheme",
    [FloatScheme("tensor"), FloatScheme("channel"), FloatScheme("block", (128, 128)), FloatScheme("block", (3, 5))],
)
def test_8_bit_floats_are_those_of_torch(instruction_set: str, dtype: torch.dtype, scheme: FloatScheme) -> None:
    for shape in ((130, 256), (9, 70), (1, 1), (257, 300)):
        weight = weight_of(shape, dtype)
        found, expected = fp8.round_fp8(weight, scheme), fp8.quantize_fp8(weight, scheme)
        assert torch.equal(found.weight["codes"].view(torch.uint8), expected["codes"].view(torch.uint8))
        assert torch.equal(found.weight["scales"], expected["scales"])
        assert found.weight["scales"].shape == expected["scales"].shape
        error = (weight.double() - expected.dequantize().double()).square().sum() / weight.double().square().sum()
        assert found.relative_error == pytest.approx(float(error.nan_to_num()), rel=1e-4)


def test_every_number_that_a_code_can_come_from_is_rounded_as_in_torch(instruction_set: str) -> None:
    """All float16 numbers up to 448 and those beside the middles of neighbouring codes, with the scale 1."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    values = halves[halves.abs() <= 448].float()
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = torch.cat([torch.nextafter(middles, torch.tensor(sign * 1e9)) for sign in (1.0, -1.0)])
    weight = torch.cat([values, middles, -middles, beside, -beside])[None]
    found = rounding.round_float8(weight, (1, 1), torch.tensor(1.0))
    assert torch.equal(found.codes, weight.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_no_numbers_are_refused(instruction_set: str, dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(4, 64, dtype=dtype)
    weight[2, 5] = bad
    with pytest.raises(InputError, match="not finite"):
        rtn.solve([weight], None, IntegerScheme(4, 32, True), torch.float16)
    with pytest.raises(InputError, match="not finite"):
        fp8.round_fp8(weight, FloatScheme("channel"))


@pytest.mark.parametrize("options", [{"symmetric": True}, {"symmetric": False}])
def test_a_scale_beyond_its_dtype_is_refused(instruction_set: str, options: dict[str, Any]) -> None:
    weight = torch.full((2, 64), 1e7)
    with pytest.raises(InputError, match="does not fit into torch"):
        rtn.solve([weight], None, IntegerScheme(4, 32, **options), torch.float16)
    assert rtn.solve([weight], None, IntegerScheme(4, 32, **options), torch.bfloat16)
