"""Per-position figures against plain Python arithmetic in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from aphroquant.evaluation import positions
from aphroquant.evaluation.positions import compare_logits


def scalar_log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = math.log(math.fsum(math.exp(x - largest) for x in logits)) + largest
    return [x - total for x in logits]


@pytest.mark.parametrize("noise", [1e-4, 0.1, 3.0])
def test_figures_equal_a_scalar_computation(noise: float) -> None:
    base = 3 * torch.randn(150, 37)
    model = base + noise * torch.randn_like(base)
    targets = torch.randint(0, 37, (150,))
    found = compare_logits(base, model, targets)
    for row, target in enumerate(targets.tolist()):
        log_p, log_q = scalar_log_softmax(base[row].tolist()), scalar_log_softmax(model[row].tolist())
        kld = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        assert float(found.kld[row]) == pytest.approx(kld, rel=1e-6, abs=1e-13)
        assert float(found.base_logprob[row]) == pytest.approx(log_p[target], rel=1e-12)
        assert float(found.model_logprob[row]) == pytest.approx(log_q[target], rel=1e-12)
        assert float(found.confidence[row]) == pytest.approx(math.exp(max(log_p)), rel=1e-12)
        assert bool(found.same_top1[row]) == (log_p.index(max(log_p)) == log_q.index(max(log_q)))


def test_equal_logits_have_no_divergence() -> None:
    logits = 20 * torch.randn(5, 1000)
    found = compare_logits(logits, logits.clone(), torch.zeros(5, dtype=torch.int64))
    assert found.kld.tolist() == [0.0] * 5
    assert found.same_top1.all()


def test_a_shift_of_all_logits_is_no_difference() -> None:
    logits = torch.randn(5, 100)
    found = compare_logits(logits, logits + 7, torch.zeros(5, dtype=torch.int64))
    assert float(found.kld.max()) < 1e-12


def test_the_direction_is_base_over_model() -> None:
    base, model = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 60.0]])  # half and half; all on the second
    forward = compare_logits(base, model, torch.tensor([0])).kld
    backward = compare_logits(model, base, torch.tensor([0])).kld
    assert float(forward) == pytest.approx(30 - math.log(2), rel=1e-6)
    assert float(backward) == pytest.approx(math.log(2), rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    base, model = torch.tensor([[3e38, -3e38]]), torch.tensor([[-3e38, 3e38]])
    found = compare_logits(base, model, torch.tensor([0]))
    assert bool(found.kld.isfinite())
    assert bool(found.model_finite)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_counts_as_the_worst_and_stays_in_its_row(value: float) -> None:
    base = torch.randn(3, 10)
    model = base.clone()
    model[1, 4] = value
    found = compare_logits(base, model, torch.zeros(3, dtype=torch.int64))
    assert found.model_finite.tolist() == [True, False, True]
    assert found.kld.tolist() == [0.0, math.inf, 0.0]
    assert float(found.model_logprob[1]) == -math.inf
    assert found.same_top1.tolist() == [True, False, True]
    assert found.base_finite.all()


def test_a_broken_base_is_told_apart() -> None:
    base = torch.randn(2, 10)
    base[0, 0] = math.nan
    assert compare_logits(base, torch.randn(2, 10), torch.zeros(2, dtype=torch.int64)).base_finite.tolist() == [
        False,
        True,
    ]


def test_rows_are_independent_of_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model, targets = torch.randn(11, 50), torch.randn(11, 50), torch.randint(0, 50, (11,))
    whole = compare_logits(base, model, targets)
    monkeypatch.setattr(positions, "ELEMENTS", 4 * 50)
    for name, expected, found in zip(whole._fields, whole, compare_logits(base, model, targets), strict=True):
        assert torch.equal(expected, found), name
