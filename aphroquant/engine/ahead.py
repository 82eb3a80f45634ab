"""Steps that have begun: their tokens may not be known yet, and the next step may begin before they are.

A runner on a GPU works while the host does its part. So the engine begins the decode step after the one whose tokens it
is about to read: these go from one step to the next on the device. A sequence that turns out to have ended by its token
has one more computed for nothing; that one is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence as Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.choice import Choice
from aphroquant.engine.sampling import RequestSampler, Sampled, sample
from aphroquant.engine.scheduler import Scheduled
from aphroquant.engine.sequence import State


class PendingTokens(Protocol):
    """The tokens of a step, one for each row of its logits."""

    @property
    def on_device(self) -> Tensor | None:
        """What the next step can take, int32 [R], in place of failed rows any token; None if the host must choose."""

    def result(self) -> list[Sampled | None]:
        """Waits for them. None for logits that are no numbers."""


@runtime_checkable
class AheadRunner(Protocol):
    """A runner whose steps can begin before the tokens of the one in front are known."""

    def forward(self, batch: ForwardBatch) -> Tensor: ...

    def forward_ahead(self, batch: ForwardBatch, tokens: Tensor, rows: list[int]) -> Tensor:
        """As `forward` for one token a sequence, which is not in the batch: sequence i has tokens[rows[i]]."""

    def begin_sampling(self, logits: Tensor, samplers: Collection[RequestSampler]) -> PendingTokens: ...


class KnownTokens:
    """Tokens chosen at once, on the host."""

    on_device = None

    def __init__(self, logits: Tensor, samplers: Collection[RequestSampler]) -> None:
        self._tokens = sample(logits, samplers)

    def result(self) -> list[Sampled | None]:
        return self._tokens


@dataclass(frozen=True)
class BegunStep:
    """What a forward was begun for, and the tokens to come for the complete ones, or why it failed."""

    part: list[Scheduled[Choice]]
    complete: list[Choice]
    outcome: PendingTokens | str

    @property
    def is_wanted(self) -> bool:
        """Whether anything of it is still running."""
        return any(scheduled.sequence.state is State.RUNNING for scheduled in self.part)
