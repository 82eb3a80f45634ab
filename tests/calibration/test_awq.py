"""The scale search by itself; folding is tested with the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphroquant.calibration.awq import Loss, candidates, search_scales, weight_magnitudes
from aphroquant.calibration.integer_grid import dequantize, min_max_grid, quantize
from aphroquant.schemes import IntegerScheme

SCHEME = IntegerScheme(3, 16, False)


def rounding(weight: Tensor) -> Tensor:
    grid = min_max_grid(weight, SCHEME)
    return dequantize(quantize(weight, grid, SCHEME), grid, SCHEME)


def output_loss(x: Tensor, weights: Sequence[Tensor]) -> Loss:
    expected = [x @ weight.T for weight in weights]
    return lambda others, _: sum(
        float((x @ other.T - y).square().mean()) for other, y in zip(others, expected, strict=True)
    )


def test_activation_outliers_get_larger_scales_and_a_smaller_loss() -> None:
    x = torch.randn(200, 64)
    x[:, 3] *= 50
    weights = [torch.randn(32, 64), torch.randn(16, 64)]
    loss = output_loss(x, weights)
    found = search_scales(weights, candidates(weights, x.abs().mean(0), group_size=16), loss, [rounding] * len(weights))
    assert found.loss < 0.5 * found.unscaled_loss
    assert found.ratio is not None
    assert int(found.scales.argmax()) == 3
    assert found.unscaled_loss == loss([rounding(weight) for weight in weights], torch.ones(64))
    assert found.loss == loss([rounding(weight * found.scales) / found.scales for weight in weights], found.scales)


def test_scaling_is_left_alone_where_nothing_is_gained() -> None:
    weights = [torch.zeros(4, 32)]
    candidate = candidates(weights, torch.ones(32), group_size=16)
    found = search_scales(weights, candidate, lambda weights, scales: 0.0, [rounding])
    assert found.ratio is None
    assert torch.equal(found.scales, torch.ones(32))


def test_tied_channels_get_equal_scales() -> None:
    x = torch.randn(100, 32) * torch.logspace(-1, 1, 32)
    weight = torch.randn(8, 32)

    def tie(channels: Tensor) -> Tensor:
        halves = channels.view(2, 16)
        return halves.mean(0, keepdim=True).expand_as(halves).reshape(-1)

    candidate = candidates([weight], x.abs().mean(0), group_size=16, tie=tie)
    found = search_scales([weight], candidate, output_loss(x, [weight]), [rounding])
    assert torch.equal(found.scales[:16], found.scales[16:])


def test_channels_that_never_fire_keep_finite_scales() -> None:
    x = torch.randn(50, 32)
    x[:, 7] = 0
    weight = torch.randn(8, 32)
    weight[:, 9] = 0
    candidate = candidates([weight], x.abs().mean(0), group_size=16)
    found = search_scales([weight], candidate, output_loss(x, [weight]), [rounding])
    assert torch.isfinite(found.scales).all()
    assert bool((found.scales > 0).all())


def test_magnitudes_are_relative_to_the_group_and_averaged_over_all_rows() -> None:
    weight = torch.tensor([[1.0, -2.0, 10.0, 5.0, 3.0]])
    expected = torch.tensor([0.5, 1.0, 1.0, 0.5, 1.0])
    torch.testing.assert_close(weight_magnitudes([weight], 2), expected)
    torch.testing.assert_close(weight_magnitudes([weight, torch.zeros(1, 5)], 2), expected / 2)
