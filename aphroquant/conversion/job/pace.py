"""How often to keep what is done: as often as a small share of the time allows."""

from __future__ import annotations

import time

SHARE = 0.04  # of a conversion's time


class Pace:
    """Something is due whenever it would take no more than SHARE of the time since it was last done."""

    def __init__(self) -> None:
        self._cost, self._last = 0.0, time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= self._cost / SHARE

    def done(self, cost: float) -> None:
        """It was, and took so many seconds."""
        self._cost, self._last = cost, time.monotonic()
