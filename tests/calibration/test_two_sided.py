"""Two-sided rounding: GPTQ where outputs do not matter to each other, and better than it where they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import gptq, two_sided
from aphroquant.calibration.integer_grid import IntegerWeightGrid, search_grid
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import IntegerScheme

SCHEME = IntegerScheme(3, 16, False)


def moment(width: int, tokens: int = 2000) -> Tensor:
    """E[x x^T] of values with strong correlations and different sizes."""
    mix = torch.randn(width, width) / width**0.5 + 0.5 * torch.randn(width, 1)
    x = (torch.randn(tokens, width) * torch.logspace(-0.5, 0.5, width)) @ mix
    return x.T @ x / tokens


def grid_of(weight: Tensor, inputs: Tensor, scheme: IntegerScheme = SCHEME) -> IntegerWeightGrid:
    grid = search_grid(weight, inputs.diagonal(), scheme)
    return IntegerWeightGrid(grid, scheme, torch.float16, weight.shape[1])


def factor(matrix: Tensor, damping: float = 0.01) -> gptq.HessianFactor:
    found = gptq.factorize(matrix, damping=damping)
    assert found is not None
    return found


def cost(error: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    error, outputs, inputs = error.double(), outputs.double(), inputs.double()
    return float(torch.trace(outputs @ error @ inputs @ error.T))


def damped(matrix: Tensor, share: float = 0.01) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(matrix.shape[0])


@pytest.mark.parametrize("tile", [1, 8, 100])
def test_with_outputs_that_do_not_matter_to_each_other_it_is_gptq(tile: int) -> None:
    weight, inputs = torch.randn(24, 48), moment(48)
    grid = grid_of(weight, inputs)
    expected = gptq.round_weight(weight, [grid.points()], factor(inputs)).codes
    outputs = factor(torch.diag(torch.rand(24) + 0.5))
    found = two_sided.round_two_sided(weight, grid, factor(inputs), outputs, tile=tile)
    assert torch.equal(found.codes, expected)


def test_with_inputs_that_do_not_matter_to_each_other_it_is_gptq_of_the_transposed_weight() -> None:
    weight, outputs = torch.randn(32, 24), moment(32)
    scheme = IntegerScheme(4, None, False)
    grid = IntegerWeightGrid(search_grid(torch.ones(32, 24), torch.ones(24), scheme), scheme, torch.float32, 24)
    grid.grid.scales.fill_(0.4)
    grid.grid.zeros.fill_(7)
    turned = IntegerWeightGrid(search_grid(torch.ones(24, 32), torch.ones(32), scheme), scheme, torch.float32, 32)
    turned.grid.scales.fill_(0.4)
    turned.grid.zeros.fill_(7)
    found = two_sided.round_two_sided(weight, grid, factor(torch.eye(24)), factor(outputs), tile=5)
    assert torch.equal(
        found.codes.T, gptq.round_weight(weight.T.contiguous(), [turned.points()], factor(outputs)).codes
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_cost_is_below_that_of_gptq(bits: int) -> None:
    scheme = IntegerScheme(bits, 16, False)
    weight, inputs, outputs = torch.randn(64, 96), moment(96), moment(64)
    grid = grid_of(weight, inputs, scheme)
    found = two_sided.round_two_sided(weight, grid, factor(inputs), factor(outputs))
    codes = gptq.round_weight(weight, [grid.points()], factor(inputs)).codes
    costs = [cost(weight - grid.decode(own), damped(outputs), damped(inputs)) for own in (found.codes, codes)]
    assert found.loss == pytest.approx(costs[0], rel=1e-3)
    assert costs[0] < 0.5 * costs[1]


@pytest.mark.parametrize("shape", [(40, 96), (33, 50), (1, 64), (64, 1), (5, 7)])
def test_tiles_do_not_change_the_result(shape: tuple[int, int]) -> None:
    weight, inputs, outputs = torch.randn(shape), moment(shape[1]), moment(shape[0])
    grid = grid_of(weight, inputs, IntegerScheme(3, None, False))
    found = [
        two_sided.round_two_sided(weight, grid, factor(inputs), factor(outputs), tile=tile).codes for tile in (1, 8, 32)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_solving_lowers_the_cost_and_keeps_the_scheme() -> None:
    weight, inputs, outputs = torch.randn(64, 96), moment(96), moment(64)
    diagonal = inputs.diagonal().clone()
    statistics = InputStatistics(1000, diagonal, diagonal.sqrt(), diagonal.sqrt(), inputs)
    found = two_sided.solve([weight, weight], statistics, SCHEME, torch.float16, [outputs, None])
    assert [solution.details["rounding"] for solution in found] == ["two-sided", "gptq"]
    costs = [cost(weight - solution.weight.dequantize(), outputs, inputs) for solution in found]
    assert costs[0] < 0.9 * costs[1]
    assert found[0].weight.scheme == SCHEME


@pytest.mark.parametrize("broken", [torch.zeros(64, 64), torch.full((64, 64), torch.nan)])
def test_gradients_that_say_nothing_leave_it_to_gptq(broken: Tensor) -> None:
    weight, inputs = torch.randn(64, 96), moment(96)
    diagonal = inputs.diagonal().clone()
    statistics = InputStatistics(1000, diagonal, diagonal.sqrt(), diagonal.sqrt(), inputs)
    found = two_sided.solve([weight], statistics, SCHEME, torch.float16, [broken])[0]
    expected = gptq.solve([weight], statistics, SCHEME, torch.float16)[0]
    assert torch.equal(found.weight["codes"], expected.weight["codes"])
