"""Searched scales of FP8 weights and error feedback on their grid."""

from __future__ import annotations

import pytest
import torch

from aphroquant.calibration import fp8, gptq, mse
from aphroquant.calibration.solution import quadratic_form
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.schemes import FloatScheme

SCHEMES = [FloatScheme("tensor"), FloatScheme("channel"), FloatScheme("block", (16, 32))]


def statistics(width: int) -> InputStatistics:
    x = torch.randn(400, width) @ torch.randn(width, width)
    moment = x.T @ x / 400
    return InputStatistics(400, moment.diagonal().clone(), x.abs().mean(0), x.abs().amax(0), moment)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(33, 70), (16, 32)], ids=str)
def test_searched_scales_never_err_more(scheme: FloatScheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    errors = []
    for solver in (fp8, mse):
        found = solver.solve([weight], None, scheme, torch.float16)[0].weight
        found.check("layer")
        errors.append(float((found.dequantize() - weight).square().sum()))
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_feedback_halves_the_error_of_the_output(scheme: FloatScheme) -> None:
    weight, seen = torch.randn(32, 96), statistics(96)
    assert seen.second_moment is not None
    losses = []
    for solver in (fp8, gptq):
        found = solver.solve([weight], seen, scheme, torch.float16)[0].weight.dequantize()
        losses.append(float(quadratic_form(weight - found, seen.second_moment).sum()))
    assert losses[1] < 0.5 * losses[0]
