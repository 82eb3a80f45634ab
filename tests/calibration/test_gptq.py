"""GPTQ against RTN, a scalar float64 reference, and Hessians that break it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import gptq, rtn
from aphroquant.calibration.grids import Points
from aphroquant.calibration.integer_grid import (
    IntegerGrid,
    IntegerWeightGrid,
    dequantize,
    min_max_grid,
    quantize,
    search_grid,
)
from aphroquant.calibration.solution import quadratic_form
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import IntegerScheme


def correlated_moment(width: int, tokens: int = 2000) -> Tensor:
    """E[x x^T] of inputs with strong correlations and very different sizes."""
    mix = torch.randn(width, width) / width**0.5 + 0.5 * torch.randn(width, 1)
    x = (torch.randn(tokens, width) * torch.logspace(-1, 1, width)[torch.randperm(width)]) @ mix
    return x.T @ x / tokens


def statistics_of(moment: Tensor) -> InputStatistics:
    diagonal = moment.diagonal().clone()
    return InputStatistics(1000, diagonal, diagonal.clamp(min=0).sqrt(), diagonal.clamp(min=0).sqrt(), moment)


def points(grid: IntegerGrid, scheme: IntegerScheme, weight: Tensor) -> list[Points]:
    return [IntegerWeightGrid(grid, scheme, torch.float16, weight.shape[1]).points()]


def loss(weight: Tensor, codes: Tensor, grid: IntegerGrid, scheme: IntegerScheme, moment: Tensor) -> float:
    return float(quadratic_form(weight - dequantize(codes, grid, scheme), moment).sum())


def reference_codes(
    weight: Tensor, grid: IntegerGrid, scheme: IntegerScheme, hessian: Tensor, damping: float
) -> Tensor:
    """One weight after the other in float64, by optimal brain surgery: the inverse is updated column by column."""
    h = hessian.double()
    order = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
    h = h + damping * h.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    w = weight.double().clone()
    codes = torch.zeros_like(w)
    size = scheme.group_size or w.shape[1]
    left = list(order)
    for column in order:
        inverse = torch.linalg.inv(h[left][:, left])
        here = left.index(column)
        for row in range(w.shape[0]):
            scale = float(grid.scales[row, column // size])
            zero = float(grid.zeros[row, column // size])
            code = min(max(round(float(w[row, column]) / scale + zero), 0), 2**scheme.bits - 1)
            codes[row, column] = code
            error = (float(w[row, column]) - (code - zero) * scale) / float(inverse[here, here])
            for other, name in enumerate(left):
                if name != column:
                    w[row, name] -= error * inverse[here, other]
        left.remove(column)
    return codes.to(torch.uint8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_error_is_below_that_of_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    scheme = IntegerScheme(bits, 16, symmetric)
    weight, moment = torch.randn(24, 64), correlated_moment(64)
    grid = search_grid(weight, moment.diagonal(), scheme)
    factor = gptq.factorize(moment, damping=0.01)
    assert factor is not None
    ours = loss(weight, gptq.round_weight(weight, points(grid, scheme, weight), factor).codes, grid, scheme, moment)
    nearest = loss(weight, quantize(weight, grid, scheme), grid, scheme, moment)
    assert ours < nearest


def test_uncorrelated_inputs_give_exactly_rounding_to_nearest() -> None:
    scheme = IntegerScheme(4, 8, False)
    weight = torch.randn(10, 40)
    grid = min_max_grid(weight, scheme)
    factor = gptq.factorize(torch.eye(40))
    assert factor is not None
    assert torch.equal(
        gptq.round_weight(weight, points(grid, scheme, weight), factor).codes, quantize(weight, grid, scheme)
    )


@pytest.mark.parametrize("shape", [(3, 12), (1, 1), (5, 20)])
def test_codes_agree_with_a_scalar_float64_reference(shape: tuple[int, int]) -> None:
    scheme = IntegerScheme(3, 4, False)
    weight, moment = torch.randn(shape), correlated_moment(shape[1])
    grid = min_max_grid(weight, scheme)
    factor = gptq.factorize(moment, damping=0.01)
    assert factor is not None
    ours = gptq.round_weight(weight, points(grid, scheme, weight), factor).codes
    assert torch.equal(ours, reference_codes(weight, grid, scheme, moment, 0.01))


def test_the_proxy_loss_is_the_quadratic_error_with_the_damped_hessian() -> None:
    scheme = IntegerScheme(4, 16, False)
    weight, moment = torch.randn(6, 48), correlated_moment(48)
    grid = min_max_grid(weight, scheme)
    factor = gptq.factorize(moment, damping=0.05)
    assert factor is not None
    codes, proxy = gptq.round_weight(weight, points(grid, scheme, weight), factor)
    damped = moment + 0.05 * moment.diagonal().mean() * torch.eye(48)
    exact = quadratic_form(weight - dequantize(codes, grid, scheme), damped)
    torch.testing.assert_close(proxy, exact, rtol=1e-3, atol=1e-5)


def test_the_loss_stays_under_the_bound_of_the_nearest_plane_method() -> None:
    """Without clamping, each row's loss is at most the sum of (scale / 2)**2 / U_ii**2 over its columns."""
    scheme = IntegerScheme(8, None, True)
    weight, moment = torch.randn(8, 32), correlated_moment(32)
    grid = IntegerGrid(torch.full((8, 1), 0.25), torch.full((8, 1), 128.0))
    factor = gptq.factorize(moment, damping=0.01)
    assert factor is not None
    proxy = gptq.round_weight(weight, points(grid, scheme, weight), factor).loss
    bound = float(((0.25 / 2) ** 2 / factor.upper.diagonal() ** 2).sum())
    assert float(proxy.max()) <= bound


@pytest.mark.parametrize("block_size", [1, 7, 33, 1000])
def test_the_block_size_does_not_change_the_result(block_size: int) -> None:
    scheme = IntegerScheme(4, 33, False)
    weight, moment = torch.randn(16, 99), correlated_moment(99)
    grid = min_max_grid(weight, scheme)
    factor = gptq.factorize(moment)
    assert factor is not None
    expected = gptq.round_weight(weight, points(grid, scheme, weight), factor, block_size=16).codes
    found = gptq.round_weight(weight, points(grid, scheme, weight), factor, block_size=block_size).codes
    assert (found != expected).float().mean() < 0.002  # ties that float rounding decides


def test_layers_solved_together_equal_layers_solved_alone() -> None:
    scheme = IntegerScheme(4, 16, False)
    statistics = statistics_of(correlated_moment(32))
    first, second = torch.randn(8, 32), torch.randn(5, 32)
    together = gptq.solve([first, second], statistics, scheme, torch.float16)
    alone = [gptq.solve([weight], statistics, scheme, torch.float16)[0] for weight in (first, second)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.weight["codes"], other.weight["codes"])
        assert one.details["proxy_loss"] == pytest.approx(other.details["proxy_loss"], rel=1e-4)


def test_a_group_size_that_does_not_divide_gives_a_shorter_last_group() -> None:
    scheme = IntegerScheme(4, 16, False)
    weight = torch.randn(4, 40)
    solution = gptq.solve([weight], statistics_of(correlated_moment(40)), scheme, torch.float16)[0]
    assert solution.weight["scales"].shape == (4, 3)
    solution.weight.check("layer")
    assert solution.relative_error < 0.05


def test_dead_inputs_are_rounded_to_nearest_and_counted() -> None:
    scheme = IntegerScheme(4, 8, False)
    moment = correlated_moment(24)
    moment[5], moment[:, 5] = 0, 0
    weight = torch.randn(4, 24)
    grid = min_max_grid(weight, scheme)
    factor = gptq.factorize(moment)
    assert factor is not None
    assert factor.dead == 1
    codes = gptq.round_weight(weight, points(grid, scheme, weight), factor).codes
    assert torch.equal(codes[:, 5], quantize(weight, grid, scheme)[:, 5])


def test_a_singular_hessian_is_damped_and_solved() -> None:
    x = torch.randn(4, 32)  # fewer tokens than channels
    statistics = statistics_of(x.T @ x / 4)
    solution = gptq.solve([torch.randn(8, 32)], statistics, IntegerScheme(4, 16, False), torch.float16)[0]
    assert solution.details["damping"] >= gptq.DAMPING
    assert not solution.warnings or solution.details["damping_retries"] > 0


def test_an_indefinite_hessian_raises_the_damping_and_says_so() -> None:
    moment = torch.eye(16) + 1.3 * (torch.ones(16, 16) - torch.eye(16)) * ((torch.arange(16) % 2) * 2.0 - 1)[:, None]
    moment = (moment + moment.T) / 2 - 0.6 * torch.ones(16, 16) + 0.6 * torch.eye(16)
    factor = gptq.factorize(moment)
    assert factor is not None
    assert factor.retries > 0
    solution = gptq.solve([torch.randn(4, 16)], statistics_of(moment), IntegerScheme(4, 8, False), torch.float16)[0]
    assert solution.details["damping_retries"] == factor.retries
    assert "damping raised" in solution.warnings[0]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_a_useless_hessian_falls_back_to_nearest_visibly(value: float) -> None:
    weight, scheme = torch.randn(4, 16), IntegerScheme(4, 8, False)
    moment = torch.full((16, 16), value)
    statistics = statistics_of(moment)._replace(mean_square=torch.ones(16))
    solution = gptq.solve([weight], statistics, scheme, torch.float16)[0]
    expected = rtn.solve([weight], statistics, scheme, torch.float16)[0]
    assert torch.equal(solution.weight["codes"], expected.weight["codes"])
    assert "fallback" in solution.details
    assert "rounded to nearest" in solution.warnings[0]


def test_one_channel_layers_work() -> None:
    statistics = statistics_of(torch.tensor([[2.0]]))
    for shape in ((1, 1), (7, 1)):
        solution = gptq.solve([torch.randn(shape)], statistics, IntegerScheme(4, None, False), torch.float16)[0]
        assert solution.relative_error < 1e-5
    wide = gptq.solve(
        [torch.randn(1, 32)], statistics_of(correlated_moment(32)), IntegerScheme(4, 8, True), torch.float16
    )
    assert wide[0].weight.shape == (1, 32)


def test_the_weight_given_is_not_modified() -> None:
    weight = torch.randn(4, 32)
    before = weight.clone()
    gptq.solve([weight], statistics_of(correlated_moment(32)), IntegerScheme(4, 16, False), torch.float16)
    assert torch.equal(weight, before)
