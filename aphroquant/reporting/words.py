"""Figures as people read them."""

from __future__ import annotations

import math

NOT_FINITE = "not finite"


def figure(value: float | None, digits: int = 3) -> str:
    """Some significant digits, without an exponent while that stays short."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def tick(value: float) -> str:
    """A round number beside an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        power = (
            exponent.replace("+", "").lstrip("0") if not exponent.startswith("-") else f"-{exponent[1:].lstrip('0')}"
        )
        return f"{mantissa}e{power}"
    return f"{value:.3g}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.{digits}%}"


def megabytes(num_bytes: int) -> str:
    """A size, in MB or GB of powers of ten, as disks are sold."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read most easily."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, length: int) -> str:
    """The text, its middle left out if it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
