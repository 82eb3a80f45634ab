"""How divergence is distributed: over positions, and over how sure the base was."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aphroquant.evaluation.summary import ConfidenceBucket, EntropyBucket, KldHistogram
from aphroquant.reporting.markup import Markup, element, join
from aphroquant.reporting.plot import BOTTOM, LEFT, RIGHT, TOP, axes, label, marker, polyline, svg
from aphroquant.reporting.report import Candidate
from aphroquant.reporting.scales import Scale, linear_scale, log_scale
from aphroquant.reporting.words import figure, percent


def histogram(candidates: Sequence[Candidate]) -> Markup | None:
    """The share of positions by divergence, on a logarithmic axis; None where no evaluation has one."""
    shown = [(i, one.evaluation.histogram) for i, one in enumerate(candidates) if one.evaluation.histogram is not None]
    if not shown:
        return None
    x, last = _histogram_axis([found for _, found in shown])
    shares = {i: _shares(found) for i, found in shown}
    y = linear_scale([share for values in shares.values() for share in values], BOTTOM, TOP)
    parts = [axes(x, y, "KL divergence of a position, nats", "share of positions, %")]
    for i, found in shown:
        points = _outline(found, shares[i], x, y, last)
        if len(shown) == 1:
            parts.append(element("polygon", class_=f"area s{i}", points=_closed(points)))
        parts.append(polyline(i, points))
    described = "; ".join(
        f"{candidates[i].name}: median {figure(candidates[i].evaluation.median_kld)}, "
        f"99th percentile {figure(candidates[i].evaluation.p99_kld)}"
        for i, _ in shown
    )
    return svg("Positions by KL divergence", described, *parts)


def by_confidence(candidates: Sequence[Candidate]) -> Markup:
    """Mean divergence in each bucket of the base's largest probability."""
    buckets = [one.evaluation.buckets for one in candidates]
    names = [f"≤ {bucket.high:g}" for bucket in buckets[0]]
    return _by_bucket(candidates, buckets, names, "base's largest probability", "Mean divergence by confidence")


def by_entropy(candidates: Sequence[Candidate]) -> Markup | None:
    """Mean divergence in each bucket of the base's entropy; None where an evaluation lacks them."""
    buckets = [one.evaluation.entropy_buckets for one in candidates]
    if not all(buckets):
        return None
    names = [f"≤ {bucket.high:g}" if bucket.high < math.inf else f"> {bucket.low:g}" for bucket in buckets[0]]
    return _by_bucket(candidates, buckets, names, "base's entropy, nats", "Mean divergence by entropy")


def _by_bucket(
    candidates: Sequence[Candidate],
    buckets: Sequence[Sequence[ConfidenceBucket | EntropyBucket]],
    names: Sequence[str],
    x_label: str,
    title: str,
) -> Markup:
    klds = [bucket.mean_kld for of_one in buckets for bucket in of_one if bucket.mean_kld is not None]
    y = log_scale(klds, BOTTOM, TOP)
    step = (RIGHT - LEFT) / len(names)
    parts = [axes(None, y, x_label, "mean KL divergence, nats")]
    parts += [label(LEFT + step * (i + 0.5), BOTTOM + 16, name) for i, name in enumerate(names)]
    for series, of_one in enumerate(buckets):
        points = [
            (LEFT + step * (i + 0.5), y.place(bucket.mean_kld), bucket)
            for i, bucket in enumerate(of_one)
            if bucket.mean_kld is not None and 0 < bucket.mean_kld < math.inf
        ]
        parts.append(polyline(series, [(at_x, at_y) for at_x, at_y, _ in points]))
        parts += [
            marker(series, at_x, at_y, f"{percent(bucket.share, 0)} of positions: {figure(bucket.mean_kld)}", size=4)
            for at_x, at_y, bucket in points
        ]
    described = "; ".join(
        f"{one.name}: " + ", ".join(f"{name} {figure(b.mean_kld)}" for name, b in zip(names, of_one, strict=True))
        for one, of_one in zip(candidates, buckets, strict=True)
    )
    return svg(title, described, *parts)


def _histogram_axis(found: Sequence[KldHistogram]) -> tuple[Scale, int]:
    """From the first bin to the last that anything is in."""
    bins = len(found[0].counts)
    used = [i for one in found for i, count in enumerate(one.counts) if count]
    first, last = (min(used), max(used) + 1) if used else (0, bins)
    width = (found[0].high - found[0].low) / bins
    low, high = found[0].low + first * width, found[0].low + last * width
    return Scale(10.0**low, 10.0**high, LEFT, RIGHT, logarithmic=True), last


def _shares(found: KldHistogram) -> list[float]:
    total = sum(found.counts) + found.non_finite
    return [100 * count / total for count in found.counts] if total else [0.0] * len(found.counts)


def _outline(found: KldHistogram, shares: Sequence[float], x: Scale, y: Scale, last: int) -> list[tuple[float, float]]:
    """The steps of the histogram as a line."""
    width = (found.high - found.low) / len(shares)
    points = [(x.start, y.start)]
    for i, share in enumerate(shares[:last]):
        edges = (10 ** (found.low + i * width), 10 ** (found.low + (i + 1) * width))
        if edges[1] > x.low * 1.0001:
            points += [(x.place(edge), y.place(share)) for edge in edges]
    return [*points, (points[-1][0], y.start)]


def _closed(points: Sequence[tuple[float, float]]) -> str:
    return join(" ".join(f"{at_x:.2f},{at_y:.2f}" for at_x, at_y in points))
