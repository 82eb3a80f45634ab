"""Quality against size: every candidate a point, and the line of those that no other one beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aphroquant.reporting.markup import Markup, element, join
from aphroquant.reporting.plot import BOTTOM, LEFT, RIGHT, TOP, axes, label, marker, svg
from aphroquant.reporting.report import Candidate
from aphroquant.reporting.scales import log_scale
from aphroquant.reporting.words import figure, megabytes, shortened

_TEXT = 12  # height of a label
_CHARACTER = 6.3  # width of one, about


def quality_against_size(candidates: Sequence[Candidate]) -> Markup:
    """Mean divergence over size in MB, both logarithmic, with intervals, the base's size and the noise floor."""
    first = candidates[0].evaluation
    floor = first.noise_floor
    drawn = [one for one in candidates if 0 < one.evaluation.mean_kld < math.inf]
    klds = [one.evaluation.mean_kld for one in drawn]
    sizes = [one.evaluation.num_bytes / 1e6 for one in candidates]
    x = log_scale([*sizes, first.base_size.num_bytes / 1e6], LEFT, RIGHT)
    y = log_scale([*klds, *([floor.mean_kld] if floor else [])], BOTTOM, TOP)
    parts = [axes(x, y, "size, MB", "mean KL divergence, nats")]
    base = x.place(first.base_size.num_bytes / 1e6)
    parts.append(element("line", class_="reference", x1=base, x2=base, y1=TOP, y2=BOTTOM))
    parts.append(label(base - 4, TOP + 10, "base", anchor="end", class_="note"))
    if floor is not None and floor.mean_kld > 0:
        at = y.place(floor.mean_kld)
        parts.append(element("line", class_="reference", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        parts.append(label(LEFT + 4, at - 4, "noise floor", anchor="start", class_="note"))
    places = [(x.place(one.evaluation.num_bytes / 1e6), y.place(one.evaluation.mean_kld)) for one in drawn]
    line = [places[i] for i in pareto([one.evaluation.num_bytes for one in drawn], klds)]
    if len(line) > 1:
        points = " ".join(f"{at_x:.2f},{at_y:.2f}" for at_x, at_y in line)
        parts.append(element("polyline", class_="pareto", points=points))
    for one, (at_x, at_y) in zip(drawn, places, strict=True):
        interval = one.evaluation.mean_kld_interval
        if interval is not None and interval[1] > 0:
            ends = (y.place(max(interval[0], y.low)), y.place(interval[1]))
            parts.append(element("line", class_="interval", x1=at_x, x2=at_x, y1=ends[0], y2=ends[1]))
        tip = f"{one.name}: {megabytes(one.evaluation.num_bytes)}, KLD {figure(one.evaluation.mean_kld)}"
        parts.append(marker(candidates.index(one), at_x, at_y, tip))
    parts.append(_labels([one.name for one in drawn], places))
    described = "; ".join(
        f"{one.name}: {megabytes(one.evaluation.num_bytes)}, {figure(one.evaluation.mean_kld)}" for one in candidates
    )
    return svg("Mean KL divergence against size", described, *parts)


def pareto(sizes: Sequence[float], klds: Sequence[float]) -> list[int]:
    """Those that no other is both smaller than and nearer to the base, by size."""
    found: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i], klds[i])):
        if not found or klds[index] < klds[found[-1]]:
            found.append(index)
    return found


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> Markup:
    """A name beside each point, moved to where it covers no other name or point."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    parts = []
    for name, (x, y) in zip(names, places, strict=True):
        text = shortened(name, 26)
        options = [
            _box(x, y, text, side, shift) for shift in (0, -14, 14, -28, 28, -42, 42) for side in ("start", "end")
        ]
        inside = [option for option in options if _fits(option[0])]
        box, side, at_y = min(inside or options, key=lambda option: sum(_overlap(option[0], other) for other in taken))
        taken.append(box)
        parts.append(label(x + (9 if side == "start" else -9), at_y, text, anchor=side, class_="name"))
    return join(parts)


Box = tuple[float, float, float, float]


def _box(x: float, y: float, text: str, side: str, shift: float) -> tuple[Box, str, float]:
    width, at_y = _CHARACTER * len(text), y + 4 + shift
    left = x + 9 if side == "start" else x - 9 - width
    return (left, at_y - _TEXT + 2, left + width, at_y + 3), side, at_y


def _fits(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= RIGHT + 8 and box[1] >= TOP - 6 and box[3] <= BOTTOM


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
