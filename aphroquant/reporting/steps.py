"""Time and memory of steps as bars."""

from __future__ import annotations

from collections.abc import Sequence

from aphroquant.reporting.markup import Markup, element
from aphroquant.reporting.plot import WIDTH, label, svg
from aphroquant.reporting.report import Step
from aphroquant.reporting.words import duration, megabytes, shortened

_ROW, _LEFT, _RIGHT = 24, 150, WIDTH - 76


def time_bars(steps: Sequence[Step], series: int = 0) -> Markup:
    """One bar a step, as long as it took."""
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    parts = []
    for row, step in enumerate(steps):
        length = max(1.0, (_RIGHT - _LEFT) * step.seconds / longest)
        middle = row * _ROW + 16
        parts.append(label(_LEFT - 8, middle + 4, shortened(step.name, 22), anchor="end"))
        parts.append(element("rect", x=_LEFT, y=middle - 7, width=length, height=14, class_=f"bar s{series}"))
        parts.append(label(_LEFT + length + 6, middle + 4, duration(step.seconds), anchor="start"))
    described = "; ".join(f"{step.name}: {duration(step.seconds)}{_memory(step)}" for step in steps)
    return svg("Time per step", described, *parts, height=_ROW * len(steps) + 8)


def _memory(step: Step) -> str:
    return "" if step.peak_memory_bytes is None else f", {megabytes(step.peak_memory_bytes)}"
