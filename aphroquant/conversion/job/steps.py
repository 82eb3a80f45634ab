"""Training steps, kept as they go on, and found again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aphroquant.conversion.job.directory import JobDirectory
from aphroquant.conversion.job.pace import Pace

_STATE, _BEST = "state", "best"


class Steps(NamedTuple):
    """How far training has come. `best` are the numbers that were best so far: none, those it began with."""

    done: int
    best: dict[str, Tensor]
    facts: dict[str, Any]


class StepKeeper:
    """Keeps nothing."""

    def go_on(self, state: Mapping[str, Tensor]) -> Steps | None:
        """Fill `state` as it was, and tell what else is known; None to begin."""
        return None

    def keep(self, steps: Steps, state: Mapping[str, Tensor], *, last: bool) -> None:
        """Training has come so far. `state` is everything that further steps depend on."""


class KeptSteps(StepKeeper):
    """Keeps the steps of one training, as records of a `kind` of their own, two at most."""

    def __init__(self, directory: JobDirectory, kind: str, say: Callable[[str], None]) -> None:
        self._directory, self._kind, self._say, self._pace = directory, kind, say, Pace()

    def go_on(self, state: Mapping[str, Tensor]) -> Steps | None:
        targets = {f"{_STATE}/{name}": tensor for name, tensor in state.items()}
        for number, record in sorted(self._directory.records(self._kind).items(), reverse=True):
            found = self._directory.take(record, targets)
            if found is None:
                self._say(f"the record of step {number} is damaged and is not used")
                continue
            device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
            best = {name.removeprefix(f"{_BEST}/"): tensor.to(device) for name, tensor in found.tensors.items()}
            self._say(f"going on after step {number}")
            return Steps(number, best, found.facts)
        return None

    def keep(self, steps: Steps, state: Mapping[str, Tensor], *, last: bool) -> None:
        if not last and not self._pace.due:
            return
        begun = time.monotonic()
        tensors = {f"{_STATE}/{name}": tensor for name, tensor in state.items()}
        tensors |= {f"{_BEST}/{name}": tensor for name, tensor in steps.best.items()}
        older = list(self._directory.records(self._kind))[:-1]
        self._directory.put(self._kind, steps.done, tensors, steps.facts)
        for number in older:
            self._directory.drop(self._kind, range(number, number + 1))
        self._pace.done(time.monotonic() - begun)
