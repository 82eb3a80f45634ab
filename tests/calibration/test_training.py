"""Trained weights, gains and their steps: they begin where rounding ended, and move only as far as they may."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import gptq, rtn
from aphroquant.calibration.differentiable import linear
from aphroquant.calibration.distill import divergence, output_gradient, step_share
from aphroquant.calibration.refine import Batch, Forward, Values, batches, refine, split_windows
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.calibration.training import Curvature, CurvatureEstimate, TrainedGain, TrainedInteger
from aphroquant.errors import InputError
from aphroquant.schemes import IntegerScheme, QuantizedWeight

SCHEMES = [
    IntegerScheme(bits, size, symmetric) for bits in (2, 4) for size in (32, None) for symmetric in (True, False)
]


def statistics_of(x: Tensor) -> InputStatistics:
    moment = x.T @ x / len(x)
    return InputStatistics(len(x), moment.diagonal().clone(), x.abs().mean(0), x.abs().amax(0), moment)


def quantized(weight: Tensor, scheme: IntegerScheme) -> QuantizedWeight:
    return gptq.solve([weight], statistics_of(torch.randn(500, weight.shape[1])), scheme, torch.float16)[0].weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("width", [64, 80])  # 80: the last group of 32 is cut short
def test_before_any_step_a_trained_weight_is_the_one_it_was_made_of(scheme: IntegerScheme, width: int) -> None:
    dense = torch.randn(12, width)
    weight = quantized(dense, scheme)
    for trained in (TrainedInteger(weight, dense), TrainedInteger(weight)):
        assert torch.equal(trained.value(), weight.dequantize())
        rounded = trained.rounded()
        assert rounded.scheme == weight.scheme
        assert all(torch.equal(rounded[name], tensor) for name, tensor in weight.tensors.items())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_move_by_one_at_most_and_only_where_a_dense_weight_is_given(scheme: IntegerScheme) -> None:
    dense = torch.randn(12, 80)
    weight = quantized(dense, scheme)
    moving, fixed = TrainedInteger(weight, dense), TrainedInteger(weight)
    gradient = torch.randn(12, 80)
    for _ in range(5):
        for trained in (moving, fixed):
            trained.step(gradient, torch.tensor(1e-3))
        moving.step_codes(gradient, Curvature(torch.full((12,), 1e-3), torch.ones(80)), torch.tensor(0.1))
    change = moving.rounded()["codes"].int() - weight["codes"].int()
    assert 0 < change.abs().max() <= 1
    moved = change * weight["scales"].float().repeat_interleave(scheme.group_size or 80, 1)[:, :80]
    assert bool((moved * gradient <= 0).all()), "a code moved along its gradient"
    assert torch.equal(fixed.rounded()["codes"], weight["codes"])
    ratio = fixed.rounded()["scales"].float() / weight["scales"].float()
    assert 1e-4 < float((ratio - 1).abs().max()) < 0.01


def test_the_gradient_of_a_scale_is_that_of_the_product() -> None:
    scheme = IntegerScheme(4, 32, symmetric=False)
    weight = quantized(torch.randn(8, 64), scheme)
    x, target = torch.randn(20, 64), torch.randn(20, 8)
    scales = weight["scales"].float().requires_grad_()
    levels = weight["codes"].float() - weight["zeros"].float().repeat_interleave(32, 1)
    ((x @ (levels * scales.repeat_interleave(32, 1)).T - target) ** 2).mean().backward()  # type: ignore[no-untyped-call]
    trained = TrainedInteger(weight)
    value = trained.value()
    ((x @ value.T - target) ** 2).mean().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    trained.step(value.grad, torch.tensor(1e-2))  # Adam's first step is the sign of the gradient
    assert scales.grad is not None
    ratio = trained.rounded()["scales"].float() / weight["scales"].float()
    assert torch.equal((ratio - 1).sign(), -(scales.grad * scales.detach()).sign())


def test_a_gain_stays_what_its_dtype_holds() -> None:
    gain = TrainedGain(torch.tensor([1.0, -2.0, 6e4]), torch.float16)
    for _ in range(50):
        gain.step(torch.tensor([1.0, -1.0, -1.0]), torch.tensor(0.01))
    rounded = gain.rounded()
    assert rounded.dtype == torch.float16
    assert 0.5 < float(rounded[0]) < 0.7
    assert -1.3 < float(rounded[1]) < -1.0
    assert float(rounded[2]) == float(torch.tensor(6e4).half())  # 65504 would be passed


def test_products_have_the_gradients_of_torch() -> None:
    found = []
    torch.manual_seed(1)
    inputs = [torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)]
    for product in (linear, torch.nn.functional.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        product(*leaves).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40, 128])
def test_held_out_windows_are_not_trained_on_unless_there_are_too_few(count: int) -> None:
    trained, held_out = split_windows(count)
    assert trained
    assert held_out
    assert set(trained) | set(held_out) == set(range(count))
    if count > 8:
        assert not set(trained) & set(held_out)


def test_every_window_comes_once_before_any_comes_again() -> None:
    drawn = [window for batch in batches(list(range(10)), 6, 4, seed=3) for window in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert list(batches(range(10), 6, 4, seed=3)) == list(batches(range(10), 6, 4, seed=3))


def test_curvature_is_that_of_a_mean_of_squares() -> None:
    x = torch.randn(400, 24) * torch.logspace(-1, 1, 24)
    sensitivity = torch.logspace(-0.5, 0.5, 6)  # of the loss, by outputs
    weight = torch.zeros(6, 24, requires_grad=True)
    estimate = CurvatureEstimate()
    for _ in range(300):
        output = (x @ weight.T) * sensitivity
        weight.grad = None
        output.backward(torch.randint(0, 2, output.shape) * 2.0 - 1)  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        estimate.add(weight.grad)
    found = estimate.finish(300 * output.numel())
    expected = 2 * sensitivity.square()[:, None] * x.square().mean(0) / 6
    torch.testing.assert_close(found.rows[:, None] * found.columns, expected, rtol=0.4, atol=0)


def refinable(method: str) -> tuple[Tensor, QuantizedWeight, Forward, Batch]:
    """A weight, what it was rounded to, and the product with correlated inputs as a block."""
    scheme = IntegerScheme(3, 32, symmetric=False)
    dense = torch.randn(32, 64) / 8
    x = torch.randn(64, 30, 64) @ (torch.eye(64) + torch.randn(64, 8) @ torch.randn(8, 64))
    solve = gptq.solve if method == "gptq" else rtn.solve
    weight = solve([dense], statistics_of(x.flatten(0, 1)), scheme, torch.float16)[0].weight

    def forward(values: Values, gains: Values, rows: Tensor) -> Tensor:
        return rows @ values["w"].T

    def batch(windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = x[list(windows)].flatten(0, 1)
        return rows, rows @ dense.T

    return dense, weight, forward, batch


@pytest.mark.parametrize(("method", "share"), [("rtn", 0.3), ("gptq", 0.95)])
def test_refinement_betters_rounding_to_nearest_by_much_and_error_feedback_a_little(method: str, share: float) -> None:
    dense, weight, forward, batch = refinable(method)
    found = refine({"w": TrainedInteger(weight, dense)}, {}, forward, batch, 64, steps=100, seed=0)
    assert found.numbers is not None
    assert found.loss_after < share * found.loss_before
    inputs, expected = batch(split_windows(64)[1])
    output = forward({"w": found.numbers.weights["w"].dequantize()}, {}, inputs)
    relative = (output - expected).square().mean(-1) / expected.square().mean(-1)
    assert float(relative.mean()) == pytest.approx(found.loss_after)


def test_refinement_repeats_exactly() -> None:
    dense, weight, forward, batch = refinable("rtn")
    found = [
        refine({"w": TrainedInteger(weight, dense)}, {}, forward, batch, 64, steps=12, seed=5).numbers for _ in range(2)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].weights["w"].same_values(found[1].weights["w"])


def test_refinement_keeps_what_it_cannot_better() -> None:
    scheme = IntegerScheme(8, 32, symmetric=True)
    dense = quantized(torch.randn(8, 32), scheme).dequantize()
    weight = rtn.solve([dense], None, scheme, torch.float16)[0].weight
    trained = TrainedInteger(weight, dense)

    def identity(windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return dense, weight.dequantize()

    found = refine({"w": trained}, {}, lambda values, *_: values["w"], identity, 8, steps=4, seed=0)
    assert found.numbers is None
    assert found.loss_after == found.loss_before


def test_an_output_that_is_not_finite_ends_refinement() -> None:
    weight = quantized(torch.randn(8, 32), IntegerScheme(4, 32, symmetric=True))

    def blank(windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.zeros(1)

    with pytest.raises(InputError, match="not finite"):
        refine({"w": TrainedInteger(weight)}, {}, lambda *_: torch.tensor(torch.nan), blank, 8, steps=4, seed=0)


def test_the_gradient_of_the_divergence_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from aphroquant.calibration import distill

    head = torch.randn(50, 16)
    source, hidden, gain = torch.randn(12, 16), torch.randn(12, 16), torch.rand(16)

    def logits(states: Tensor, gains: Tensor) -> Tensor:
        return (states * gains) @ head.T

    whole = output_gradient(hidden, gain, source, gain, logits, 50)
    monkeypatch.setattr(distill, "_LOGIT_ELEMENTS", 250)
    parts = output_gradient(hidden, gain, source, gain, logits, 50)
    assert parts.divergence == pytest.approx(whole.divergence, rel=1e-5)
    torch.testing.assert_close(parts.by_hidden, whole.by_hidden)
    torch.testing.assert_close(parts.by_gain, whole.by_gain)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits(source, gain)),
        torch.distributions.Categorical(logits=logits(hidden, gain)),
    )
    torch.testing.assert_close(divergence(logits(source, gain), logits(hidden, gain)), expected)
    assert whole.divergence == pytest.approx(float(expected.mean()), rel=1e-5)


def test_steps_rise_and_then_fall_to_nothing() -> None:
    shares = [step_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) > 0.95
    assert shares[-1] < 1e-3
    assert sorted(shares[10:], reverse=True) == shares[10:]
