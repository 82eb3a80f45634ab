"""FP8 codes and scales of every granularity."""

from __future__ import annotations

import pytest
import torch

from aphroquant.calibration.fp8 import E4M3_MAX, quantize_fp8, solve
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.errors import InputError
from aphroquant.schemes import ActivationScheme, FloatScheme

SCHEMES = [FloatScheme("tensor"), FloatScheme("channel"), FloatScheme("block", (16, 32))]
STATIC = FloatScheme("tensor", activations=ActivationScheme("float", dynamic=False, granularity="tensor"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (16, 32)])
def test_every_value_is_within_the_precision_of_e4m3(scheme: FloatScheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    quantized = quantize_fp8(weight, scheme)
    quantized.check("layer")
    error = (quantized.dequantize() - weight).abs()
    smallest_step = float(weight.abs().max()) / E4M3_MAX * 2**-10  # half a subnormal step
    assert bool((error <= weight.abs() * 2**-4 + smallest_step).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_largest_value_of_a_scale_is_exact(scheme: FloatScheme) -> None:
    quantized = quantize_fp8(torch.randn(32, 64), scheme)
    assert float(quantized["codes"].float().abs().max()) == E4M3_MAX


def test_zero_weights_get_the_scale_one() -> None:
    for scheme in SCHEMES:
        quantized = quantize_fp8(torch.zeros(20, 40), scheme)
        assert torch.equal(quantized["scales"], torch.ones_like(quantized["scales"]))
        assert torch.equal(quantized.dequantize(), torch.zeros(20, 40))


def test_static_input_scales_come_from_the_greatest_activation_and_are_shared() -> None:
    statistics = InputStatistics(10, torch.ones(8), torch.ones(8), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 89.6]))
    solutions = solve([torch.randn(4, 8), torch.randn(2, 8)], statistics, STATIC, torch.float16)
    assert [float(solution.weight["input_scale"]) for solution in solutions] == [pytest.approx(0.2)] * 2


def test_weights_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(InputError, match="not finite"):
        quantize_fp8(torch.tensor([[1.0, float("nan")]]), FloatScheme("tensor"))
