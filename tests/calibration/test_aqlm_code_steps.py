"""Steps on the codes of additive weights: only where they gain, few at a time, and stored as they are used."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.training import TrainedAdditive
from aphroquant.calibration.aqlm.weighted import nearest_codes, summed
from aphroquant.calibration.training import Curvature
from aphroquant.schemes import AdditiveScheme, QuantizedWeight

SCHEME = AdditiveScheme(2, 4, 1, 4)


def weight_of(rows: int = 64, groups: int = 16) -> QuantizedWeight:
    """Random codes and books: far from any dense weight."""
    tensors = {
        "codes": torch.randint(0, 16, (rows, groups, 2)).to(SCHEME.dtypes()["codes"]),
        "codebooks": torch.randn(2, 16, 1, 4).half(),
        "scales": (torch.rand(rows) + 0.5).half(),
    }
    return QuantizedWeight(SCHEME, tensors, (rows, groups * 4))


def cost(target: Tensor, weights: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    return ((target - summed(books, codes)).square() * weights).sum(1)


def test_a_wide_beam_finds_the_nearest_codes() -> None:
    target, weights, books = torch.randn(20, 4), torch.rand(20, 4) + 0.1, torch.randn(2, 8, 4)
    current = torch.randint(0, 8, (20, 2))
    found = cost(target, weights, books, nearest_codes(target, weights, books, current, 64))
    pairs = torch.tensor(list(product(range(8), repeat=2)))
    every = torch.stack([cost(target, weights, books, pair.expand(20, 2)) for pair in pairs])
    assert torch.allclose(found, every.min(0).values, atol=1e-5)


def test_codes_are_never_worse_than_those_there_are() -> None:
    target, weights, books = torch.randn(50, 4), torch.rand(50, 4), torch.randn(3, 8, 4)
    current = nearest_codes(target, weights, books, torch.randint(0, 8, (50, 3)), 64)
    found = nearest_codes(target, weights, books, current, 1)
    assert (cost(target, weights, books, found) <= cost(target, weights, books, current) + 1e-6).all()


def test_steps_bring_a_least_squares_loss_down_which_codebooks_alone_do_not() -> None:
    wanted, inputs, found = torch.randn(64, 64), torch.randn(512, 64), []
    bend = Curvature(torch.ones(64), 2 * inputs.square().mean(0))
    for moves_codes in (False, True):
        torch.manual_seed(1)
        trained = TrainedAdditive(weight_of())
        for step in range(300):
            value = trained.value()
            ((inputs @ (value - wanted).T).square().sum() / len(inputs)).backward()
            assert value.grad is not None
            share = 1 - step / 300
            trained.step(value.grad, torch.tensor(3e-3 * share))
            if moves_codes:
                trained.step_codes(value.grad, bend, torch.tensor(0.01 * share))
        found.append(float((trained.rounded().dequantize() - wanted).square().mean()))
    assert found[1] < 0.7 * found[0]


def test_a_step_changes_one_group_in_a_hundred_at_most() -> None:
    weight = weight_of(64, 50)
    trained = TrainedAdditive(weight)
    bend, before = Curvature(torch.ones(64), torch.ones(200)), weight["codes"].clone()
    for size, most in ((0.01, 32), (0.0025, 8), (0.0, 0)):
        now = trained.rounded()["codes"].clone()
        trained.step_codes(torch.randn(64, 200), bend, torch.tensor(size))
        changed = int((trained.rounded()["codes"] != now).any(2).sum())
        assert changed <= most
        assert bool(changed) == bool(most)
    assert torch.equal(weight["codes"], before)  # what was given is not written to


def test_what_is_stored_does_not_change_with_later_steps() -> None:
    trained = TrainedAdditive(weight_of())
    bend = Curvature(torch.ones(64), torch.ones(64))
    trained.step_codes(torch.randn(64, 64), bend, torch.tensor(0.01))
    kept = trained.rounded()
    codes = kept["codes"].clone()
    assert codes.dtype == SCHEME.dtypes()["codes"]
    trained.step_codes(torch.randn(64, 64), bend, torch.tensor(0.01))
    assert torch.equal(kept["codes"], codes)
    assert not torch.equal(trained.rounded()["codes"], codes)


def test_gradients_of_zero_change_nothing() -> None:
    trained = TrainedAdditive(weight_of())
    before = trained.rounded()["codes"].clone()
    trained.step_codes(torch.zeros(64, 64), Curvature(torch.zeros(64), torch.zeros(64)), torch.tensor(0.01))
    assert torch.equal(trained.rounded()["codes"], before)
