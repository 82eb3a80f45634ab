"""How much work a conversion is worth: each level names a solver, how much text, and how many steps of training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from aphroquant.errors import UsageError

DEFAULT_EFFORT = "normal"
FEW_BITS = 3


@dataclass(frozen=True)
class Effort:
    """`samples` windows of text, `refine_steps` a block, `distill_steps` of the whole model.

    `few_bits_solver` is for integers of FEW_BITS or less, where it pays to make up in later layers for what earlier
    ones lose; training does that in its own way.
    `allocation_tries` choices of bits are measured besides the estimated one. `cost` is for the user."""

    name: str
    solver: str
    few_bits_solver: str
    samples: int
    refine_steps: int
    distill_steps: int
    cost: str
    allocation_tries: int = 0


EFFORTS: Mapping[str, Effort] = {
    effort.name: effort
    for effort in (
        Effort("fast", "awq-gptq", "awq-gptaq", 32, 0, 0, "a quarter of the text"),
        Effort("normal", "awq-gptq", "awq-gptaq", 128, 0, 0, "about two minutes on 2 cores", allocation_tries=12),
        Effort(
            "best",
            "awq-gptq",
            "awq-gptq",
            128,
            300,
            200,
            "training steps as well, meant for a GPU",
            allocation_tries=40,
        ),
    )
}


def find_effort(name: str) -> Effort:
    """The effort of that name. UsageError listing the known ones."""
    if name not in EFFORTS:
        near = difflib.get_close_matches(name, EFFORTS, n=1)
        known = f"efforts are {', '.join(EFFORTS)}"
        raise UsageError(f"unknown effort {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return EFFORTS[name]
