"""Amounts of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AMOUNT = re.compile(r"(\d{1,30}(?:\.\d+)?)\s*([kmg]i?)?b?", re.ASCII)


def bytes_in(text: str) -> int | None:
    """What 512MiB, 4GB or 1000 mean; None for what means no amount."""
    match = _AMOUNT.fullmatch(text.strip().lower())
    return None if match is None else int(float(match[1]) * _UNITS[match[2] or ""])
