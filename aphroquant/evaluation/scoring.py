"""Log-probabilities of continuations: every request's tokens go through the model once, block by block.

Requests are padded to a few lengths (causal attention never looks at what follows) and streamed together, so that a
model larger than the memory can be scored, and requests with the same input, as the answers of multiple choice often
are, share one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.evaluation.measure import LOGIT_ROWS, reference_linear
from aphroquant.models.streamed import CPU, Batch, StreamedModel

PORTION_TOKENS = 1 << 17  # whose hidden states exist at once
_STEP = 32  # lengths are padded to multiples of this
Key = tuple[int, ...]


class Request(NamedTuple):
    """Tokens of a context, at least one, and of what continues it."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The continuation's log-probability, and whether greedy decoding would write it."""

    logprob: float
    is_greedy: bool


class ContinuationScorer:
    """Scores continuations under one checkpoint, in float32. Contexts too long lose their beginning."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device = CPU) -> None:
        self._model = StreamedModel(checkpoint, make_linear=reference_linear, device=device)
        self.max_length = checkpoint.spec.max_position_embeddings

    def score(self, requests: Sequence[Request], on_scored: Callable[[int, int], None] | None = None) -> list[Score]:
        """One score a request, in order."""
        cut = [_Cut.of(request, self.max_length) for request in requests]
        by_input: dict[Key, list[int]] = {}
        for number, one in enumerate(cut):
            by_input.setdefault(one.inputs, []).append(number)
        scores: dict[int, Score] = {}
        for portion in _portions(sorted(by_input, key=len, reverse=True)):
            for key, hidden in self._hidden(portion):
                for number in by_input[key]:
                    scores[number] = self._score(hidden, cut[number].continuation)
            if on_scored is not None:
                on_scored(len(scores), len(requests))
        return [scores[number] for number in range(len(requests))]

    def _hidden(self, inputs: Sequence[Key]) -> Iterator[tuple[Key, Tensor]]:
        """Each input with its hidden states [S, H]."""
        groups = [list(group) for _, group in itertools.groupby(inputs, key=_padded_length)]
        batches = [Batch(_padded(group, min(_padded_length(group[0]), self.max_length))) for group in groups]
        states = self._model.hidden_states_of(batches)
        for group, found in zip(groups, states, strict=True):
            yield from ((key, hidden[: len(key)]) for key, hidden in zip(group, found, strict=True))

    def _score(self, hidden: Tensor, continuation: Sequence[int]) -> Score:
        """Of the last rows, one a token of the continuation."""
        if not continuation:
            return Score(0.0, True)
        logprob, is_greedy = 0.0, True
        rows, targets = hidden[-len(continuation) :], torch.tensor(continuation)
        for start in range(0, len(targets), LOGIT_ROWS):
            expected = targets[start : start + LOGIT_ROWS, None]
            logits = self._model.logits(rows[start : start + LOGIT_ROWS]).cpu().double()
            logprob += float(logits.log_softmax(-1).gather(1, expected).sum())
            is_greedy = is_greedy and bool((logits.argmax(-1, keepdim=True) == expected).all())
        return Score(logprob, is_greedy)


class _Cut(NamedTuple):
    """What goes into the model, and the part of the continuation that it is scored on."""

    inputs: Key
    continuation: Sequence[int]

    @classmethod
    def of(cls, request: Request, max_length: int) -> _Cut:
        assert request.context, "a context has at least one token"
        continuation = tuple(request.continuation)[-max_length:]
        inputs = (
            (*request.context, *request.continuation[:-1])[-max_length:] if continuation else (request.context[-1],)
        )
        return cls(tuple(inputs), continuation)


def _padded_length(key: Key) -> int:
    return -(-len(key) // _STEP) * _STEP


def _padded(inputs: Sequence[Key], length: int) -> Tensor:
    """int64 [B, length], with zeros behind the tokens."""
    return torch.tensor([[*key, *[0] * (length - len(key))] for key in inputs])


def _portions(inputs: Sequence[Key]) -> Iterator[list[Key]]:
    """Inputs in turn, of at most PORTION_TOKENS tokens together (or a single one)."""
    portion: list[Key] = []
    size = 0
    for key in inputs:
        if portion and size + _padded_length(key) > PORTION_TOKENS:
            yield portion
            portion, size = [], 0
        portion.append(key)
        size += _padded_length(key)
    if portion:
        yield portion
