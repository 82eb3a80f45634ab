"""HQQ's zero points: better than those of the range, real or whole, and as they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aphroquant.calibration import hqq, rtn
from aphroquant.errors import InputError
from aphroquant.schemes import AffineScheme, IntegerScheme, Scheme


def error(weight: Tensor, module: object, scheme: Scheme) -> float:
    """Squared, relative to the size of each weight; small ones count as a seventh of their group's mean."""
    found = module.solve([weight], None, scheme, torch.float16)[0].weight  # type: ignore[attr-defined]
    found.check("layer")
    groups = weight.view(weight.shape[0], -1, scheme.group_size or weight.shape[1])  # type: ignore[union-attr]
    sizes = groups.square() + 0.02 * groups.square().mean(-1, keepdim=True)
    return float(((found.dequantize() - weight).square() / sizes.view_as(weight)).sum())


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_zero_points_beat_whole_ones_and_those_are_no_worse_than_the_range(
    bits: int, group_size: int | None
) -> None:
    weight = torch.distributions.StudentT(5.0).sample((24, 64))  # heavy tails, as weights have them
    real, whole = AffineScheme(bits, group_size), IntegerScheme(bits, group_size, False)
    assert error(weight, hqq, real) < error(weight, hqq, whole) <= error(weight, rtn, whole) * 1.001


def test_weights_of_nearly_nothing_mostly_stay_so() -> None:
    """As they are behind a small gain, where inputs are large."""
    weight = torch.randn(16, 64)
    weight[:, 5] *= 1e-3
    found = hqq.solve([weight], None, AffineScheme(4, 64), torch.float16)[0].weight.dequantize()
    step = float((weight.amax(1) - weight.amin(1)).mean()) / 15
    assert float((found - weight)[:, 5].abs().median()) < 0.1 * step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_and_zero_points_have_the_stored_dtype(dtype: torch.dtype) -> None:
    found = hqq.solve([torch.randn(8, 32)], None, AffineScheme(4, 16), dtype)[0].weight
    assert (found["scales"].dtype, found["zeros"].dtype) == (dtype, dtype)
    assert found["zeros"].shape == (16,)


@pytest.mark.parametrize("scheme", [AffineScheme(4, 16), IntegerScheme(4, 16, False)], ids=str)
@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 32), torch.full((4, 32), 0.75), torch.randn(4, 32) + 100], ids=["0", "c", "far"]
)
def test_odd_weights_become_finite_numbers_near_them(scheme: Scheme, weight: Tensor) -> None:
    found = hqq.solve([weight], None, scheme, torch.float16)[0].weight.dequantize()
    assert bool(torch.isfinite(found).all())
    assert float((found - weight).abs().max()) <= 0.07 * float(weight.abs().max())


def test_weights_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(InputError):
        hqq.solve([torch.tensor([[1.0, float("nan")] * 16])], None, AffineScheme(4, 16), torch.float16)
