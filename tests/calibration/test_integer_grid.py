"""Grids: coverage, the search, and what is stored."""

from __future__ import annotations

import pytest
import torch

from aphroquant.calibration import rtn
from aphroquant.calibration.integer_grid import (
    dequantize,
    expand,
    min_max_grid,
    quantize,
    search_grid,
    to_quantized_weight,
)
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.errors import InputError
from aphroquant.schemes import IntegerScheme

SCHEMES = [
    IntegerScheme(bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (None, 8, 24)
    for symmetric in (False, True)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_is_within_half_a_step_inside_the_range(scheme: IntegerScheme) -> None:
    weight = torch.randn(6, 48)
    grid = min_max_grid(weight, scheme, torch.float32)
    rounded = dequantize(quantize(weight, grid, scheme), grid, scheme)
    steps = expand(grid, scheme, 48).scales
    slack = 1.001 if scheme.symmetric else 1.0 + 1e-5  # the symmetric grid ends half a step early on one side
    whole = (weight - rounded).abs() / steps
    assert float(whole.max()) <= (0.5 + (0.5 if not scheme.symmetric else 0.0)) * slack
    assert float(whole.median()) <= 0.5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_canonical_weight_dequantizes_to_the_same_numbers(scheme: IntegerScheme) -> None:
    weight = torch.randn(5, 50)
    grid = search_grid(weight, torch.ones(50), scheme)
    codes = quantize(weight, grid, scheme)
    quantized = to_quantized_weight(codes, grid, scheme)
    quantized.check("layer")
    assert torch.equal(quantized.dequantize(), dequantize(codes, grid, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_is_never_worse_than_the_whole_range_for_zero_points(scheme: IntegerScheme) -> None:
    weight, importance = torch.randn(7, 48) ** 3, torch.rand(48) ** 4
    errors = []
    for grid in (min_max_grid(weight, scheme), search_grid(weight, importance, scheme)):
        rounded = dequantize(quantize(weight, grid, scheme), grid, scheme)
        errors.append(float(((weight - rounded).square() * importance).sum()))
    assert errors[1] <= errors[0] * 1.001


def test_important_columns_are_rounded_finer() -> None:
    scheme = IntegerScheme(3, None, False)
    weight = torch.randn(50, 64)
    weight[:, 0] = 6.0
    importance = torch.ones(64)
    importance[0] = 0.0  # an outlier that does not matter
    grid = search_grid(weight, importance, scheme)
    rounded = dequantize(quantize(weight, grid, scheme), grid, scheme)
    plain = min_max_grid(weight, scheme)
    whole = dequantize(quantize(weight, plain, scheme), plain, scheme)
    assert (weight - rounded)[:, 1:].square().sum() < 0.5 * (weight - whole)[:, 1:].square().sum()


def test_the_symmetric_search_uses_the_longer_side_of_the_grid() -> None:
    scheme = IntegerScheme(2, None, True)
    weight = torch.tensor([[1.0, 0.5, -0.5, 0.0], [-1.0, 0.5, -0.5, 0.0]])
    grid = search_grid(weight, torch.ones(4), scheme)
    assert torch.equal(dequantize(quantize(weight, grid, scheme), grid, scheme), weight)
    assert grid.scales[0] < 0 < grid.scales[1]


def test_scales_are_values_of_the_stored_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        grid = search_grid(torch.randn(4, 32), torch.ones(32), IntegerScheme(4, 8, False), dtype)
        assert torch.equal(grid.scales, grid.scales.to(dtype).float())


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_stay_zero(symmetric: bool) -> None:
    scheme = IntegerScheme(4, 8, symmetric)
    weight = torch.zeros(3, 16)
    weight[:, 8:] = torch.randn(3, 8)
    for grid in (min_max_grid(weight, scheme), search_grid(weight, torch.ones(16), scheme)):
        rounded = dequantize(quantize(weight, grid, scheme), grid, scheme)
        assert torch.equal(rounded[:, :8], torch.zeros(3, 8))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign_keep_their_zero_point_within_the_codes(sign: float) -> None:
    scheme = IntegerScheme(4, None, False)
    weight = sign * (5.0 + torch.rand(3, 32))
    grid = min_max_grid(weight, scheme)
    assert int(grid.zeros.min()) >= 0
    assert int(grid.zeros.max()) <= 15
    assert float((dequantize(quantize(weight, grid, scheme), grid, scheme) - weight).abs().max()) < 0.3


def test_a_weight_too_large_for_the_scale_dtype_is_an_error() -> None:
    with pytest.raises(InputError, match="too large, or not finite"):
        min_max_grid(torch.full((1, 8), 1e7), IntegerScheme(4, None, False))


def test_rtn_without_statistics_covers_the_range_and_with_them_searches() -> None:
    weight, scheme = torch.randn(4, 32), IntegerScheme(4, 8, False)
    plain = rtn.solve([weight], None, scheme, torch.float16)[0]
    assert plain.details["range"] == "whole"
    grid = min_max_grid(weight, scheme)
    assert torch.equal(plain.weight["codes"], quantize(weight, grid, scheme))
    statistics = InputStatistics(10, torch.rand(32), torch.rand(32), torch.rand(32))
    searched = rtn.solve([weight], statistics, scheme, torch.float16)[0]
    assert searched.details["range"] == "searched"
    error = (weight - plain.weight.dequantize()).square() @ statistics.mean_square
    better = (weight - searched.weight.dequantize()).square() @ statistics.mean_square
    assert better.sum() <= error.sum()
