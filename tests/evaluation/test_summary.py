"""Statistics of positions: quantiles, standard errors that respect windows, infinities that show."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from aphroquant.evaluation.intervals import clustered_stderr
from aphroquant.evaluation.positions import Positions, compare_logits
from aphroquant.evaluation.summary import quantile, summarize


def positions(count: int = 400, noise: float = 0.5) -> Positions:
    base = 3 * torch.randn(count, 20)
    return compare_logits(base, base + noise * torch.randn_like(base), torch.randint(0, 20, (count,)))


def test_figures_equal_those_of_numpy() -> None:
    found = positions()
    summary = summarize(found, 4)
    kld = found.kld.numpy()
    assert summary.mean_kld == pytest.approx(kld.mean())
    for name, share in {"median_kld": 0.5, "p90_kld": 0.9, "p99_kld": 0.99, "p999_kld": 0.999, "max_kld": 1}.items():
        assert getattr(summary, name) == pytest.approx(np.quantile(kld, share)), name
    assert summary.perplexity == pytest.approx(np.exp(-found.model_logprob.numpy().mean()))
    assert summary.log_ratio == pytest.approx(math.log(summary.perplexity / summary.base_perplexity))
    difference = found.base_logprob.numpy() - found.model_logprob.numpy()
    assert summary.log_ratio_stderr_tokens == pytest.approx(difference.std(ddof=1) / 20)
    means = difference.reshape(4, 100).mean(1)
    assert summary.log_ratio_stderr == pytest.approx(means.std(ddof=1) / 2)
    delta_p = np.exp(found.model_logprob.numpy()) - np.exp(found.base_logprob.numpy())
    assert summary.delta_p_rms == pytest.approx(np.sqrt((delta_p**2).mean()))
    assert summary.delta_p_mean == pytest.approx(delta_p.mean())


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = compare_logits(torch.randn(10, 50), torch.zeros(10, 50), torch.randint(0, 50, (10,)))
    assert summarize(found, 1).perplexity == pytest.approx(50)


def test_copies_of_a_token_in_its_window_do_not_shrink_the_clustered_error() -> None:
    window_means = torch.randn(6, 1, dtype=torch.float64)
    once, copied = window_means.flatten(), window_means.expand(6, 100).reshape(-1)
    assert clustered_stderr(copied, 6) == pytest.approx(clustered_stderr(once, 6))


def test_one_window_has_no_clustered_error() -> None:
    summary = summarize(positions(), 1)
    assert summary.log_ratio_stderr is None
    assert summary.mean_kld_stderr is None
    assert summary.log_ratio_stderr_tokens > 0


def test_one_broken_position_makes_every_mean_infinite_and_no_figure_nan() -> None:
    found = positions(8)
    model_finite = found.model_finite.clone()
    model_finite[3] = False
    broken = found._replace(
        kld=found.kld.masked_fill(~model_finite, math.inf),
        model_logprob=found.model_logprob.masked_fill(~model_finite, -math.inf),
        model_finite=model_finite,
    )
    summary = summarize(broken, 2)
    assert summary.non_finite_share == 1 / 8
    assert summary.mean_kld == summary.max_kld == summary.perplexity == summary.log_ratio == math.inf
    assert summary.mean_kld_stderr == summary.log_ratio_stderr == summary.log_ratio_stderr_tokens == math.inf
    figures = [value for value in dataclasses.asdict(summary).values() if isinstance(value, float)]
    assert not any(math.isnan(value) for value in figures)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_quantiles_of_infinities_are_infinite_or_finite_but_never_nan(share: float) -> None:
    assert quantile(torch.tensor([math.inf] * 5), share) == math.inf
    assert not math.isnan(quantile(torch.tensor([0.0, 1.0, math.inf, math.inf]), share))


def test_a_single_position_has_figures() -> None:
    summary = summarize(positions(1), 1)
    assert summary.p999_kld == summary.median_kld == summary.mean_kld


def test_buckets_hold_every_position_once() -> None:
    found = positions()
    buckets = summarize(found, 1).buckets
    assert sum(bucket.share for bucket in buckets) == pytest.approx(1)
    mean = sum(bucket.share * bucket.mean_kld for bucket in buckets if bucket.mean_kld is not None)
    assert mean == pytest.approx(float(found.kld.mean()))


def test_an_empty_bucket_has_no_figures() -> None:
    logits = torch.zeros(4, 2)
    logits[:, 0] = 100.0  # the base is always sure
    buckets = summarize(compare_logits(logits, logits, torch.zeros(4, dtype=torch.int64)), 1).buckets
    assert [bucket.share for bucket in buckets] == [0, 0, 0, 0, 0, 1]
    assert buckets[0].mean_kld is None
    assert buckets[-1].top1_agreement == 1
