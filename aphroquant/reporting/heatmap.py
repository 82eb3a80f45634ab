"""Error of every layer's modules as a map: layers down, modules across, on a logarithmic scale of colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aphroquant.reporting.markup import Markup, element
from aphroquant.reporting.plot import WIDTH, label, svg
from aphroquant.reporting.report import Candidate, ModuleError
from aphroquant.reporting.words import figure, shortened

LEVELS = 9  # colours, `h0` .. `h8` in the style sheet
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LEFT, _TOP = 34, 58
_OUTSIDE = 0.05  # of the errors, at each end of the colours


def heat_map(candidate: Candidate) -> Markup | None:
    """The map of one candidate; None if its conversion measured no errors."""
    errors = [one for one in candidate.errors if 0 <= one.error < math.inf]
    if not errors:
        return None
    layers, modules = sorted({one.layer for one in errors}), module_names(errors)
    height = 11 if len(layers) <= 48 else max(4, 528 // len(layers))
    width = (WIDTH - _LEFT - 8) / len(modules)
    low, high = _range(errors)
    parts = [
        element(
            "rect",
            element("title", f"layer {one.layer}, {one.module}: {figure(one.error)}"),
            x=_LEFT + width * modules.index(one.module),
            y=_TOP + height * layers.index(one.layer),
            width=width - 1,
            height=max(height - 1, 3),
            class_=f"heat h{_level(one.error, low, high)}",
        )
        for one in errors
    ]
    parts += [
        label(_LEFT + width * (i + 0.5), _TOP - 6, shortened(name.replace("_proj", ""), max(4, int(width / 6.5))))
        for i, name in enumerate(modules)
    ]
    every = max(1, math.ceil(len(layers) / 12))
    parts += [
        label(_LEFT - 5, _TOP + height * (i + 0.5) + 4, str(layer), anchor="end")
        for i, layer in enumerate(layers)
        if i % every == 0
    ]
    worst = max(errors, key=lambda one: one.error)
    described = f"Worst: layer {worst.layer}, {worst.module}, {figure(worst.error)}"
    bottom = _TOP + height * len(layers) + 8
    return svg(f"Relative squared output error, {candidate.name}", described, *_key(low, high), *parts, height=bottom)


def module_names(errors: Sequence[ModuleError]) -> list[str]:
    """All modules, in the order that a block computes them."""
    names = {one.module for one in errors}
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def _range(errors: Sequence[ModuleError]) -> tuple[float, float]:
    """Powers of ten around all errors but the least and the greatest: few outliers would leave one colour to all."""
    logs = sorted(math.log10(one.error) for one in errors if one.error > 0)
    if not logs:
        return -1.0, 0.0
    outside = int(_OUTSIDE * len(logs))
    low, high = logs[outside], logs[-1 - outside]
    return low, max(high, low + 1e-6)


def _level(error: float, low: float, high: float) -> int:
    if error <= 0:
        return 0
    share = (math.log10(error) - low) / (high - low)
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def _key(low: float, high: float) -> list[Markup]:
    """Which colour is how much."""
    width, left = 22, _LEFT + 70
    squares = [
        element("rect", x=left + width * i, y=8, width=width, height=12, class_=f"heat h{i}") for i in range(LEVELS)
    ]
    ends = (
        label(left - 6, 18, f"≤ {figure(10**low, 2)}", anchor="end"),
        label(left + width * LEVELS + 6, 18, f"≥ {figure(10**high, 2)}", anchor="start"),
    )
    return [*squares, *ends]
