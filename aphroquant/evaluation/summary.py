"""From positions to figures: means with standard errors and intervals, quantiles, perplexities, buckets, a histogram.

Standard errors are clustered by window (aphroquant/evaluation/intervals.py); the paired per-token value of the
perplexity's logarithm stands beside it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aphroquant.evaluation.intervals import Interval, clustered_stderr, mean_interval, share_interval, token_stderr
from aphroquant.evaluation.positions import Positions

BUCKET_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
ENTROPY_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, math.inf)
DELTA_P_SHARES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
HISTOGRAM_DECADES = (-8, 2)  # powers of ten; what lies outside counts in the first or last bin
HISTOGRAM_BINS = 40  # four a decade


@dataclass(frozen=True)
class ConfidenceBucket:
    """Positions where the base's largest probability is in (low, high]. Figures are None in an empty bucket."""

    low: float
    high: float
    share: float
    mean_kld: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class EntropyBucket:
    """Positions where the base's entropy, in nats, is in (low, high]; the first has those of 0 as well."""

    low: float
    high: float
    share: float
    mean_kld: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class KldHistogram:
    """How many positions have which divergence: `counts` between 10**`low` and 10**`high`, in equal steps of log10."""

    low: float
    high: float
    counts: tuple[int, ...]
    non_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures over all scored positions; divergences and log-ratios in nats. Infinite if any logit is not finite.

    Intervals are of 95 %; like standard errors they are None with one window, and None where a mean is infinite.
    """

    mean_kld: float
    mean_kld_stderr: float | None  # clustered by window; None with one window
    mean_kld_interval: Interval | None = None
    median_kld: float
    p90_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    non_finite_share: float
    top1_agreement: float
    top1_interval: Interval | None = None  # Wilson, for the number of tokens that the windows' spread allows
    perplexity: float
    base_perplexity: float
    log_ratio: float  # ln(perplexity / base_perplexity), the mean paired difference of token losses
    log_ratio_stderr: float | None  # clustered by window; None with one window
    log_ratio_interval: Interval | None = None
    log_ratio_stderr_tokens: float  # sd of the paired differences / sqrt(tokens), as if tokens were independent
    delta_p_mean: float  # model's minus base's probability of the token that followed
    delta_p_rms: float
    delta_p_quantiles: dict[str, float] = field(default_factory=dict)  # "0.01" is the 1st percentile, ...
    buckets: tuple[ConfidenceBucket, ...]
    entropy_buckets: tuple[EntropyBucket, ...] = ()
    histogram: KldHistogram | None = None


def summarize(positions: Positions, num_windows: int) -> Summary:
    """The figures of positions that are `num_windows` windows of equal length, one after the other."""
    kld = positions.kld
    log_ratio = positions.base_logprob - positions.model_logprob  # [T], loss of the model minus loss of the base
    delta_p = positions.model_logprob.exp() - positions.base_logprob.exp()
    ordered, ordered_delta = kld.sort().values, delta_p.sort().values
    mean_kld, kld_stderr = float(kld.mean()), clustered_stderr(kld, num_windows)
    mean_ratio, ratio_stderr = float(log_ratio.mean()), clustered_stderr(log_ratio, num_windows)
    return Summary(
        mean_kld=mean_kld,
        mean_kld_stderr=kld_stderr,
        mean_kld_interval=mean_interval(mean_kld, kld_stderr, num_windows),
        median_kld=quantile(ordered, 0.5),
        p90_kld=quantile(ordered, 0.9),
        p99_kld=quantile(ordered, 0.99),
        p999_kld=quantile(ordered, 0.999),
        max_kld=float(ordered[-1]),
        non_finite_share=1 - _mean(positions.model_finite),
        top1_agreement=_mean(positions.same_top1),
        top1_interval=share_interval(positions.same_top1, num_windows),
        perplexity=_perplexity(positions.model_logprob),
        base_perplexity=_perplexity(positions.base_logprob),
        log_ratio=mean_ratio,
        log_ratio_stderr=ratio_stderr,
        log_ratio_interval=mean_interval(mean_ratio, ratio_stderr, num_windows),
        log_ratio_stderr_tokens=token_stderr(log_ratio),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(delta_p.square().mean().sqrt()),
        delta_p_quantiles={f"{share:g}": quantile(ordered_delta, share) for share in DELTA_P_SHARES},
        buckets=_buckets(positions),
        entropy_buckets=_entropy_buckets(positions),
        histogram=_histogram(kld),
    )


def quantile(ordered: Tensor, share: float) -> float:
    """The quantile of ascending values, interpolated linearly; infinite values are allowed."""
    place = share * (len(ordered) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    return low if low == high else low + (high - low) * (place - math.floor(place))


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _perplexity(logprob: Tensor) -> float:
    loss = -float(logprob.mean())
    return math.exp(loss) if loss < 700 else math.inf


def _buckets(positions: Positions) -> tuple[ConfidenceBucket, ...]:
    members = _members(positions.confidence, BUCKET_EDGES)
    edges = itertools.pairwise(BUCKET_EDGES)
    return tuple(
        ConfidenceBucket(low, high, *_figures(positions, inside))
        for (low, high), inside in zip(edges, members, strict=True)
    )


def _entropy_buckets(positions: Positions) -> tuple[EntropyBucket, ...]:
    members = _members(positions.entropy, ENTROPY_EDGES)
    edges = itertools.pairwise(ENTROPY_EDGES)
    return tuple(
        EntropyBucket(low, high, *_figures(positions, inside))
        for (low, high), inside in zip(edges, members, strict=True)
    )


def _members(values: Tensor, edges: tuple[float, ...]) -> list[Tensor]:
    """For each bucket which positions it has."""
    index = torch.bucketize(values, torch.tensor(edges[1:-1], dtype=torch.float64))  # 0 for values <= edges[1], ...
    return [index == i for i in range(len(edges) - 1)]


def _figures(positions: Positions, members: Tensor) -> tuple[float, float | None, float | None]:
    """Share of all positions, mean divergence, top-1 agreement."""
    share = _mean(members)
    if share == 0:
        return 0.0, None, None
    return share, float(positions.kld[members].mean()), _mean(positions.same_top1[members])


def _histogram(kld: Tensor) -> KldHistogram:
    low, high = HISTOGRAM_DECADES
    finite = kld[kld.isfinite()]
    place = (finite.clamp(min=10.0**low).log10() - low) * (HISTOGRAM_BINS / (high - low))
    counts = torch.bincount(place.long().clamp(0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    return KldHistogram(low, high, tuple(counts.tolist()), len(kld) - len(finite))
