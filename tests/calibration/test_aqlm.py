"""The AQLM solver against float64, against rounding to a grid, and against its own earlier phases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import gptq
from aphroquant.calibration.aqlm.codebooks import fit_codebooks, fit_scales
from aphroquant.calibration.aqlm.codes import first_codes, group_metric, improve_codes, search
from aphroquant.calibration.aqlm.kmeans import kmeans, nearest, residual_kmeans
from aphroquant.calibration.aqlm.solve import AqlmSettings, damped_moment, first_state, solve, solve_one
from aphroquant.calibration.aqlm.state import Additive, output_error, sum_by_code
from aphroquant.calibration.aqlm.training import TrainedAdditive
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import AdditiveScheme, IntegerScheme, QuantizedWeight

SMALL = AdditiveScheme(2, 4)


def correlated_moment(width: int, tokens: int = 2000) -> Tensor:
    """E[x x^T] of inputs with strong correlations and very different sizes."""
    mix = torch.randn(width, width) / width**0.5 + 0.5 * torch.randn(width, 1)
    x = (torch.randn(tokens, width) * torch.logspace(-1, 1, width)[torch.randperm(width)]) @ mix
    return x.T @ x / tokens


def statistics_of(moment: Tensor) -> InputStatistics:
    diagonal = moment.diagonal().clone()
    return InputStatistics(1000, diagonal, diagonal.sqrt(), diagonal.sqrt(), moment)


def random_state(rows: int, width: int, scheme: AdditiveScheme) -> Additive:
    codes = torch.randint(2**scheme.code_bits, (rows, width // scheme.in_group, scheme.num_codebooks))
    books = torch.randn(scheme.num_codebooks, 2**scheme.code_bits, scheme.in_group)
    return Additive(codes, books, torch.rand(rows) + 0.5)


def exact_error(weight: Tensor, state: Additive, moment: Tensor) -> float:
    """tr(E H E^T) in float64, from the definition."""
    error = weight.double().clone()
    in_group = state.books.shape[2]
    for row, group, book in itertools.product(*map(range, state.codes.shape)):
        entry = state.books[book, state.codes[row, group, book]].double()
        error[row, group * in_group : (group + 1) * in_group] -= state.scales[row].double() * entry
    return float(torch.trace(error @ moment.double() @ error.T))


def test_the_error_is_the_quadratic_form_in_float64() -> None:
    state, weight, moment = random_state(6, 32, SMALL), torch.randn(6, 32), correlated_moment(32)
    found = output_error(weight - state.weight(), moment)
    assert found == pytest.approx(exact_error(weight, state, moment), rel=1e-5)


def test_sums_by_code_are_those_of_a_loop() -> None:
    values, codes = torch.randn(50, 3), torch.randint(5, (50,))
    expected = torch.stack([values[codes == code].sum(0) for code in range(7)])
    torch.testing.assert_close(sum_by_code(values, codes, 7), expected)


def test_kmeans_covers_separate_clusters() -> None:
    points = (10 * torch.randn(6, 4)).repeat_interleave(40, 0) + 0.01 * torch.randn(240, 4)
    entries = kmeans(points, torch.ones_like(points), 60, torch.Generator().manual_seed(1))
    assert float(nearest(points, torch.ones_like(points), entries)[1].max()) < 0.1


def test_an_entry_is_the_mean_by_importance() -> None:
    points, importance = torch.randn(90, 4), torch.rand(90, 4) + 0.1
    entry = kmeans(points, importance, 1, torch.Generator())[0]
    torch.testing.assert_close(entry, (points * importance).sum(0) / importance.sum(0))


def test_kmeans_with_fewer_points_than_entries_is_exact() -> None:
    points = torch.randn(9, 8)
    books = residual_kmeans(points, torch.ones_like(points), 1, 16, torch.Generator())
    assert float(nearest(points, torch.ones_like(points), books[0])[1].max()) < 1e-4


def test_a_wide_beam_finds_the_best_codes() -> None:
    target, books = torch.randn(20, 4), torch.randn(2, 8, 4)
    factor = torch.linalg.cholesky(correlated_moment(4))
    sums = (books[0][:, None] + books[1][None]).flatten(0, 1)  # all 64
    costs = ((target[:, None] - sums) @ factor).square().sum(2)
    found = search(target, factor, books, 64)
    torch.testing.assert_close(found.costs, costs.min(1).values, rtol=1e-4, atol=1e-5)
    narrow = search(target, factor, books, 2)
    assert (narrow.costs >= found.costs - 1e-5).all()


def test_a_search_is_never_worse_than_the_codes_it_begins_with() -> None:
    target, books, current = torch.randn(50, 4), torch.randn(3, 8, 4), torch.randint(8, (50, 3))
    factor = torch.linalg.cholesky(correlated_moment(4))
    own = ((target - sum(books[m][current[:, m]] for m in range(3))) @ factor).square().sum(1)
    assert (search(target, factor, books, 1, current).costs <= own * (1 + 1e-5) + 1e-5).all()


def test_no_phase_raises_the_error() -> None:
    weight, moment = torch.randn(40, 64), damped_moment(torch.empty(1, 64), statistics_of(correlated_moment(64)), 0.01)
    state = first_state(weight, moment, SMALL, AqlmSettings())
    state.codes = first_codes(weight, state, moment, 4)
    errors = [exact_error(weight, state, moment)]
    for _ in range(3):
        fit_codebooks(weight, state, moment, 10)
        errors.append(exact_error(weight, state, moment))
        fit_scales(weight, state, moment)
        errors.append(exact_error(weight, state, moment))
        improve_codes(weight, state, moment, group_metric(moment, 8), 4)
        errors.append(exact_error(weight, state, moment))
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)
    assert errors[-1] < 0.97 * errors[0]


def test_fitted_codebooks_are_those_of_least_squares() -> None:
    scheme = AdditiveScheme(2, 2, in_group=4)
    state, weight, moment = random_state(30, 16, scheme), torch.randn(30, 16), correlated_moment(16) + torch.eye(16)
    fit_codebooks(weight, state, moment, 60)
    factor = torch.linalg.cholesky(moment.double())
    columns = []
    for place in range(state.books.numel()):
        one = torch.zeros(state.books.numel()).index_fill_(0, torch.tensor(place), 1.0).view_as(state.books)
        columns.append((Additive(state.codes, one, state.scales).weight().double() @ factor).flatten())
    target = (weight.double() @ factor).flatten()
    matrix = torch.stack(columns, 1)
    best = matrix @ torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    assert exact_error(weight, state, moment) == pytest.approx(float((target - best).square().sum()), rel=1e-3)


def test_the_scale_of_a_row_is_the_best_one() -> None:
    state, weight, moment = random_state(5, 32, SMALL), torch.randn(5, 32), correlated_moment(32)
    weight = weight + 3 * state.weight()
    fit_scales(weight, state, moment)
    best = exact_error(weight, state, moment)
    for factor in (0.99, 1.01):
        assert exact_error(weight, Additive(state.codes, state.books, state.scales * factor), moment) > best


def test_the_error_is_below_kmeans_alone_and_below_two_bits_on_a_grid() -> None:
    weight, moment = torch.randn(320, 128), correlated_moment(128)
    statistics = statistics_of(moment)
    told: dict[str, float] = {}
    scheme = AdditiveScheme(2, 6)  # 1.5 bits a weight, and codebooks
    damped = damped_moment(weight, statistics, 0.05)
    ours = solve_one(weight, damped, statistics, scheme, AqlmSettings(), told.setdefault)
    assert told["stored"] < 0.5 * told["k-means"]
    [grid] = gptq.solve([weight], statistics, IntegerScheme(2, 128, False), torch.float16)
    assert ours.weight.num_bits < grid.weight.num_bits
    assert ours.relative_error < grid.relative_error


@pytest.mark.parametrize("scheme", [AdditiveScheme(1, 8), AdditiveScheme(3, 4, in_group=4)], ids=str)
def test_solutions_hold_together_and_repeat_bit_for_bit(scheme: AdditiveScheme) -> None:
    weights, statistics = [torch.randn(24, 32), torch.randn(8, 32)], statistics_of(correlated_moment(32))
    solutions = solve(weights, statistics, scheme, torch.float16)
    again = solve(weights, statistics, scheme, torch.float16)
    for weight, solution, repeated in zip(weights, solutions, again, strict=True):
        solution.weight.check("layer")
        assert solution.weight.shape == tuple(weight.shape)
        assert solution.weight.same_values(repeated.weight)
        error = weight.double() - solution.weight.dequantize(torch.float64)
        moment = statistics.second_moment.double()  # type: ignore[union-attr]
        expected = torch.trace(error @ moment @ error.T) / torch.trace(weight.double() @ moment @ weight.double().T)
        assert solution.relative_error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("case", ["no statistics", "zeros", "dead inputs", "not finite"])
def test_odd_statistics_still_give_a_weight(case: str) -> None:
    weight, moment = torch.randn(10, 32), correlated_moment(32)
    moment = {"zeros": torch.zeros(32, 32), "not finite": torch.full((32, 32), torch.nan)}.get(case, moment)
    if case == "dead inputs":
        moment[8:20], moment[:, 8:20] = 0, 0
    statistics = None if case == "no statistics" else statistics_of(moment)
    [solution] = solve([weight], statistics, AdditiveScheme(2, 6), torch.float16)
    assert torch.isfinite(solution.weight.dequantize()).all()
    rest = weight - solution.weight.dequantize()
    assert float(rest.square().sum()) < 0.6 * float(weight.square().sum())


@pytest.mark.parametrize("size", [1e-4, 3e4])
def test_weights_of_any_size_fit_into_the_stored_numbers(size: float) -> None:
    weight = torch.randn(12, 16) * size
    weight[3] = 0
    [solution] = solve([weight], None, AdditiveScheme(1, 6), torch.float16)
    assert solution.relative_error < 0.35
    assert not solution.weight.dequantize()[3].abs().max() > 0.5 * size


def quantized(weight: Tensor, statistics: InputStatistics | None = None) -> QuantizedWeight:
    return solve([weight], statistics, AdditiveScheme(2, 5), torch.float16)[0].weight


def test_gradients_by_codebooks_and_scales_are_those_of_autograd() -> None:
    weight = quantized(torch.randn(12, 32))
    trained, gradient = TrainedAdditive(weight), torch.randn(12, 32)
    books = weight["codebooks"][:, :, 0].double().requires_grad_()
    scales = weight["scales"].double().requires_grad_()
    sums = sum(books[m][weight["codes"][..., m].long()] for m in range(2))
    (sums * scales[:, None, None]).flatten(1).backward(gradient.double())
    trained.step(gradient, torch.tensor(1e-3))
    assert books.grad is not None
    assert scales.grad is not None
    moved = trained.value().detach() - weight.dequantize()
    step = (
        torch.where(books.grad != 0, -books.grad.sign(), 0)
        * 1e-3
        * books.detach().square().mean((1, 2)).sqrt()[:, None, None]
    )
    factors = torch.exp(-1e-3 * scales.grad.sign())
    books_after, scales_after = books.detach() + step, scales.detach() * factors
    expected = sum(books_after[m][weight["codes"][..., m].long()] for m in range(2)) * scales_after[:, None, None]
    torch.testing.assert_close(
        moved.double(), expected.flatten(1) - weight.dequantize(torch.float64), rtol=2e-3, atol=1e-6
    )


def test_training_brings_the_output_nearer_to_another_target() -> None:
    weight, target, x = quantized(torch.randn(24, 64)), torch.randn(24, 64) * 0.1, torch.randn(300, 64)
    target = weight.dequantize() + target
    trained = TrainedAdditive(weight)
    losses = []
    for _ in range(60):
        value = trained.value()
        loss = ((value - target) @ x.T).square().mean()
        loss.backward()
        assert value.grad is not None
        trained.step(value.grad, torch.tensor(3e-3))
        losses.append(float(loss.detach()))
    stored = trained.rounded()
    stored.check("layer")
    assert torch.equal(stored["codes"], weight["codes"])
    assert float(((stored.dequantize() - target) @ x.T).square().mean()) < 0.9 * losses[0]
