"""Corrected weights: least squares towards the source's outputs and states, from the quantized model's inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.calibration.drift import Drift


def inputs(tokens: int = 600, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the source, of the quantized model, and how far its states [T, 10] lag behind."""
    source = torch.randn(tokens, width) @ (torch.randn(width, width) / width**0.5)
    x = source + 0.3 * torch.randn(tokens, width) @ torch.randn(width, width) / width**0.5
    return source, x, 0.2 * x @ torch.randn(width, 10) + 0.1 * torch.randn(tokens, 10)


def least_squares(weight: Tensor, source: Tensor, x: Tensor, states: Tensor | None) -> Tensor:
    """The best weight in float64, with the damping that rounding has."""
    wanted = source.double() @ weight.double().T + (0 if states is None else states.double())
    moment = x.double().T @ x.double() / len(x)
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    missing = wanted - x.double() @ weight.double().T
    return weight.double() + torch.linalg.solve(damped, x.double().T @ missing / len(x)).T


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_correction_by_inputs_is_that_of_least_squares(share: float) -> None:
    (source, x, _), weights, drift = inputs(), [torch.randn(10, 24), torch.randn(3, 24)], Drift()
    for part in (slice(0, 250), slice(250, 600)):
        drift.add(source[part] - x[part], x[part])
    for weight, found in zip(weights, drift.by_inputs(weights, x.T @ x / len(x), share=share), strict=True):
        expected = least_squares(weight, source, x, None)
        assert torch.allclose(found.double(), weight.double() + share * (expected - weight.double()), atol=1e-4)


def test_the_correction_by_outputs_makes_up_for_the_states_too() -> None:
    (source, x, states), weight, drift = inputs(), torch.randn(10, 24), Drift()
    drift.add(source @ weight.T + states - x @ weight.T, x)
    found = drift.by_outputs(weight, x.T @ x / len(x), share=1.0)
    assert torch.allclose(found.double(), least_squares(weight, source, x, states), atol=1e-4)


def test_the_output_comes_nearer_to_the_sources() -> None:
    (source, x, states), weight, drift = inputs(), torch.randn(10, 24), Drift()
    wanted, moment = source @ weight.T + states, x.T @ x / len(x)
    drift.add(wanted - x @ weight.T, x)
    tried = [weight, *(drift.by_outputs(weight, moment, share=share) for share in (0.5, 1.0))]
    errors = [float((wanted - x @ own.T).square().mean()) for own in tried]
    assert errors[0] > errors[1] > errors[2]


def test_without_drift_weights_stay_as_they_are() -> None:
    (source, _, _), weight, drift = inputs(), torch.randn(10, 24), Drift()
    drift.add(source - source, source)
    assert torch.equal(drift.by_inputs([weight], source.T @ source / len(source))[0], weight)


@pytest.mark.parametrize(("factor", "moment"), [(0.0, torch.zeros(24, 24)), (1.0, torch.full((24, 24), torch.nan))])
def test_inputs_that_cannot_be_used_leave_weights_as_they_are(factor: float, moment: Tensor) -> None:
    (source, x, _), weight, drift = inputs(), torch.randn(10, 24), Drift()
    drift.add(source - x, x * factor)
    assert torch.equal(drift.by_inputs([weight], moment)[0], weight)


def test_tokens_that_are_larger_than_most_are_not_corrected_beyond_what_they_miss() -> None:
    (source, x, _), weight, drift = inputs(), torch.randn(10, 24), Drift()
    drift.add(source - x, x)
    moment = x.T @ x / len(x) / 1000  # of all tokens
    wanted = source @ weight.T
    found = drift.by_inputs([weight], moment)[0]
    assert (wanted - x @ found.T).square().mean() < (wanted - x @ weight.T).square().mean()
