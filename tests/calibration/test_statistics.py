"""Statistics of activations against float64, and inputs that are not finite."""

from __future__ import annotations

import pytest
import torch

from aphroquant.calibration.gram import gram
from aphroquant.calibration.statistics import StatisticsCollector
from aphroquant.errors import InputError
from aphroquant.kernels.reference.matmul import linear


@pytest.mark.parametrize("width", [1, 5, 255, 300])
def test_moments_agree_with_float64_whatever_the_chunks(width: int) -> None:
    x = torch.randn(77, width) * torch.logspace(-2, 2, width)
    collector = StatisticsCollector("layer", width, 7, second_moment=True)
    for part in x.split([7, 35, 14, 21]):
        collector.update(part)
    found = collector.finish()
    exact = x.double()
    assert found.num_tokens == 77
    assert found.second_moment is not None
    moment = exact.T @ exact / 77
    scale = moment.diagonal().sqrt()
    assert float(((found.second_moment.double() - moment) / (scale[:, None] * scale[None])).abs().max()) < 1e-5
    torch.testing.assert_close(found.mean_square.double(), exact.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean_abs.double(), exact.abs().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(found.max_abs, x.abs().amax(0))


def test_without_the_second_moment_the_rest_is_the_same() -> None:
    x = torch.randn(20, 6)
    collectors = [StatisticsCollector("layer", 6, 5, second_moment=wanted) for wanted in (True, False)]
    for collector in collectors:
        collector.update(x)
    full, small = (collector.finish() for collector in collectors)
    assert small.second_moment is None
    torch.testing.assert_close(full.mean_square, small.mean_square)


def test_dead_channels_are_counted() -> None:
    x = torch.randn(10, 4)
    x[:, 2] = 0
    collector = StatisticsCollector("layer", 4, 5, second_moment=False)
    collector.update(x)
    assert collector.finish().dead_channels == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    collector = StatisticsCollector("model.layers.3.mlp.down_proj", 4, 5, second_moment=True)
    collector.update(torch.ones(10, 4))
    bad = torch.ones(10, 4)
    bad[7, 1] = value
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.down_proj.*sample 3, position 2"):
        collector.update(bad)


def test_the_gram_matrix_is_exactly_symmetric() -> None:
    matrix = gram(torch.randn(50, 301))
    assert torch.equal(matrix, matrix.T)


def test_the_fast_product_agrees_with_torch() -> None:
    x, weight, bias = torch.randn(33, 70), torch.randn(19, 70), torch.randn(19)
    torch.testing.assert_close(
        linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4
    )
    assert linear(torch.empty(0, 70), weight).shape == (0, 19)
    doubled = linear(x.double(), weight.double())
    torch.testing.assert_close(doubled, x.double() @ weight.double().T)
