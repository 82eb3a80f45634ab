"""From positions to figures: means with standard errors, quantiles, perplexities, buckets.

Standard errors are clustered by window. Tokens of one window share a context and a subject, so they are not
independent draws, and the usual sd / sqrt(tokens) says too little; the spread between windows is the honest yardstick.
With n windows of equal length it is sd(window means) / sqrt(n). The paired per-token value stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.evaluation.positions import Positions

BUCKET_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class ConfidenceBucket:
    """Positions where the base's largest probability is in (low, high]. Figures are None in an empty bucket."""

    low: float
    high: float
    share: float
    mean_kld: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Summary:
    """Figures over all scored positions; divergences and log-ratios in nats. Infinite if any logit is not finite."""

    mean_kld: float
    mean_kld_stderr: float | None  # clustered by window; None with one window
    median_kld: float
    p90_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    non_finite_share: float
    top1_agreement: float
    perplexity: float
    base_perplexity: float
    log_ratio: float  # ln(perplexity / base_perplexity), the mean paired difference of token losses
    log_ratio_stderr: float | None  # clustered by window; None with one window
    log_ratio_stderr_tokens: float  # sd of the paired differences / sqrt(tokens), as if tokens were independent
    delta_p_mean: float  # model's minus base's probability of the token that followed
    delta_p_rms: float
    buckets: tuple[ConfidenceBucket, ...]


def summarize(positions: Positions, num_windows: int) -> Summary:
    """The figures of positions that are `num_windows` windows of equal length, one after the other."""
    kld = positions.kld
    log_ratio = positions.base_logprob - positions.model_logprob  # [T], loss of the model minus loss of the base
    delta_p = positions.model_logprob.exp() - positions.base_logprob.exp()
    ordered = kld.sort().values
    return Summary(
        mean_kld=float(kld.mean()),
        mean_kld_stderr=clustered_stderr(kld, num_windows),
        median_kld=quantile(ordered, 0.5),
        p90_kld=quantile(ordered, 0.9),
        p99_kld=quantile(ordered, 0.99),
        p999_kld=quantile(ordered, 0.999),
        max_kld=float(ordered[-1]),
        non_finite_share=1 - _mean(positions.model_finite),
        top1_agreement=_mean(positions.same_top1),
        perplexity=_perplexity(positions.model_logprob),
        base_perplexity=_perplexity(positions.base_logprob),
        log_ratio=float(log_ratio.mean()),
        log_ratio_stderr=clustered_stderr(log_ratio, num_windows),
        log_ratio_stderr_tokens=_stderr(log_ratio),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(delta_p.square().mean().sqrt()),
        buckets=_buckets(positions),
    )


def quantile(ordered: Tensor, share: float) -> float:
    """The quantile of ascending values, interpolated linearly; infinite values are allowed."""
    place = share * (len(ordered) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    return low if low == high else low + (high - low) * (place - math.floor(place))


def clustered_stderr(values: Tensor, num_windows: int) -> float | None:
    """Standard error of the mean of `num_windows` equally long windows, from the spread of their means."""
    if num_windows < 2:
        return None
    return _stderr(values.view(num_windows, -1).mean(1))


def _stderr(values: Tensor) -> float:
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.inf
    return float(values.std()) / math.sqrt(len(values))


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _perplexity(logprob: Tensor) -> float:
    loss = -float(logprob.mean())
    return math.exp(loss) if loss < 700 else math.inf


def _buckets(positions: Positions) -> tuple[ConfidenceBucket, ...]:
    edges = torch.tensor(BUCKET_EDGES, dtype=torch.float64)
    index = torch.bucketize(positions.confidence, edges[1:-1])  # 0 for confidence <= edges[1], ...
    return tuple(_bucket(positions, index == i, *BUCKET_EDGES[i : i + 2]) for i in range(len(BUCKET_EDGES) - 1))


def _bucket(positions: Positions, members: Tensor, low: float, high: float) -> ConfidenceBucket:
    share = _mean(members)
    if share == 0:
        return ConfidenceBucket(low, high, 0.0, None, None)
    return ConfidenceBucket(low, high, share, float(positions.kld[members].mean()), _mean(positions.same_top1[members]))
