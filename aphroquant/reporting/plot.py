"""The parts that plots share: a frame with axes, markers and lines by series, a legend.

A plot is 420 units wide and set in 12 units: readable on a telephone, where it shrinks to 330 pixels, and beside a
second one on a wide screen. Colours are classes (`s0` .. `s7`) that the style sheet sets for light, dark and paper;
markers and dashes tell series apart without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aphroquant.reporting.markup import Child, Markup, element, join
from aphroquant.reporting.scales import Scale
from aphroquant.reporting.words import tick

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 408, 14, 244  # the plotting area
SERIES = 8
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 3", "4 2", "1 3", "6 2 1 2")
_MARKER_SIDES = ((0, 0), (4, 45), (3, -90), (4, 0), (3, 90), (5, -90), (6, 0), (8, 22.5))  # corners, first angle


def svg(title: str, description: str, *children: Child, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """The whole drawing, with what a screen reader says instead of it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        view_box=f"0 0 {width} {height}",
        role="img",
        class_="plot",
        xmlns="http://www.w3.org/2000/svg",
        aria_label=f"{title}. {description}",
    )


def axes(x: Scale | None, y: Scale, x_label: str, y_label: str) -> Markup:
    """Grid, ticks and labels. Without `x` the caller labels that axis."""
    parts: list[Markup] = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(element("line", class_="grid", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        parts.append(label(LEFT - 6, at + 4, tick(value), anchor="end"))
    for value in x.ticks() if x is not None else ():
        at = x.place(value) if x is not None else 0.0
        parts.append(element("line", class_="grid", x1=at, x2=at, y1=TOP, y2=BOTTOM))
        parts.append(label(at, BOTTOM + 16, tick(value)))
    parts.append(element("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    parts.append(label((LEFT + RIGHT) / 2, HEIGHT - 8, x_label, class_="axis-label"))
    middle = (TOP + BOTTOM) / 2
    parts.append(label(12, middle, y_label, class_="axis-label", transform=f"rotate(-90 12 {middle:g})"))
    return join(parts)


def label(
    x: float, y: float, text: str, *, anchor: str = "middle", class_: str = "tick", transform: str | None = None
) -> Markup:
    """A text at a place."""
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=class_, transform=transform)


def marker(series: int, x: float, y: float, tip: str | None = None, size: float = 5.0) -> Markup:
    """The sign of a series: another shape for each."""
    name = f"mark s{series % SERIES}"
    title = None if tip is None else element("title", tip)
    sides, angle = _MARKER_SIDES[series % SERIES]
    if not sides:
        return element("circle", title, cx=x, cy=y, r=size, class_=name)
    reach = size * (1.3 if sides == 3 else 1.15)
    corners = (math.radians(angle + 360 * i / sides) for i in range(sides))
    points = " ".join(f"{x + reach * math.cos(turn):.2f},{y + reach * math.sin(turn):.2f}" for turn in corners)
    return element("polygon", title, points=points, class_=name)


def polyline(series: int, points: Sequence[tuple[float, float]], *, class_: str = "line") -> Markup:
    """The line of a series: another dash for each."""
    return element(
        "polyline",
        points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points),
        class_=f"{class_} s{series % SERIES}",
        stroke_dasharray=_DASHES[series % SERIES] or None,
    )


def legend(names: Sequence[str]) -> Markup:
    """Which sign is whose; nothing where there is only one."""
    if len(names) < 2:
        return Markup("")
    entries = [
        element("li", element("svg", _sample(i), view_box="0 0 30 14", class_="key", aria_hidden="true"), name)
        for i, name in enumerate(names)
    ]
    return element("ul", entries, class_="legend")


def _sample(series: int) -> Markup:
    return join([polyline(series, [(0, 7), (30, 7)]), marker(series, 15, 7)])
