"""Generation drift: how long a candidate's greedy answers stay those of its base.

Teacher forcing shows one step at a time; in generation a single different token changes everything after it. Base and
candidate continue the same prompts greedily in the engine, and what is reported is where they first part.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DriftFigures:
    """One kind of prompts. Positions count generated tokens from 0.

    Quartiles of the first differing position are None where so many answers never differed that they are not reached.
    `identical_after` maps numbers of tokens to the share of answers that were the same up to there.
    """

    kind: str
    prompts: int
    prompt_tokens: float  # mean
    generated_tokens: float  # mean, of the base
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    never: float  # share of answers that are the same to the end
    identical_after: dict[str, float]

    @property
    def quartiles(self) -> tuple[float | None, float | None, float | None]:
        return self.first_quartile, self.median, self.third_quartile


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Figures by kind of prompt; up to `max_tokens` tokens were generated."""

    max_tokens: int
    seconds: float
    kinds: tuple[DriftFigures, ...]
