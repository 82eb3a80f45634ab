"""How a row of logits is drawn from."""

from __future__ import annotations

from typing import NamedTuple


class TokenDraw(NamedTuple):
    """How one row is drawn; `position` in [0, 1) is where in the cumulative distribution. Temperature 0 is greedy."""

    position: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
