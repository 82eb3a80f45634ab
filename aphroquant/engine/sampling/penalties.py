"""Samplers that change single logits, because of tokens seen so far or still forbidden."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from aphroquant.engine.sampling.candidates import FloatArray, IntArray


class Adjuster(Protocol):
    """Changes a row of logits in place; told of every token of the output."""

    def apply(self, logits: FloatArray) -> None: ...

    def observe(self, token: int) -> None: ...


class Tally:
    """Distinct tokens and how often each was seen, in arrays that grow: a step costs what the distinct tokens cost."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        ids, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
        self._index = {int(token): index for index, token in enumerate(ids)}
        self._ids = ids
        self._counts = counts.astype(np.float32)

    @property
    def ids(self) -> IntArray:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> FloatArray:
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(index + 8, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(index + 8, np.float32)))
        self._ids[index] = token
        self._counts[index] += 1


class RepetitionPenalty:
    """Tokens of prompt and output: positive logits are divided by the penalty, negative ones multiplied."""

    def __init__(self, penalty: float, prompt: Sequence[int]) -> None:
        self._penalty = np.float32(penalty)
        self._seen = Tally(prompt)

    def apply(self, logits: FloatArray) -> None:
        chosen = logits[self._seen.ids]
        logits[self._seen.ids] = np.where(chosen > 0, chosen / self._penalty, chosen * self._penalty)

    def observe(self, token: int) -> None:
        self._seen.add(token)


class FrequencyPenalty:
    """Tokens of the output: the penalty is subtracted once for each time that they were generated."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)
        self._seen = Tally()

    def apply(self, logits: FloatArray) -> None:
        logits[self._seen.ids] -= self._penalty * self._seen.counts

    def observe(self, token: int) -> None:
        self._seen.add(token)


class PresencePenalty:
    """Tokens of the output: the penalty is subtracted once."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)
        self._seen = Tally()

    def apply(self, logits: FloatArray) -> None:
        logits[self._seen.ids] -= self._penalty

    def observe(self, token: int) -> None:
        self._seen.add(token)


class MinTokens:
    """Tokens that would end the output are forbidden until it has `min_tokens` tokens."""

    def __init__(self, min_tokens: int, ending: Iterable[int]) -> None:
        self._num_missing = min_tokens
        self._ending = np.array(sorted(ending), np.int64)

    def apply(self, logits: FloatArray) -> None:
        if self._num_missing > 0:
            logits[self._ending] = -np.inf

    def observe(self, token: int) -> None:
        self._num_missing -= 1
