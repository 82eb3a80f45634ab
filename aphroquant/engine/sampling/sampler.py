"""The chain of samplers of one request, and a step's rows through their chains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from aphroquant.engine.sampling.candidates import Candidates, FloatArray
from aphroquant.engine.sampling.draw import draw, request_generator
from aphroquant.engine.sampling.logprobs import RankedLogprobs, ranked_logprobs
from aphroquant.engine.sampling.penalties import (
    Adjuster,
    FrequencyPenalty,
    MinTokens,
    PresencePenalty,
    RepetitionPenalty,
)
from aphroquant.engine.sampling.truncation import MinP, Temperature, TopK, TopP, Truncation
from aphroquant.engine.types import SamplingParams
from aphroquant.kernels.cuda.sampling.draws import TokenDraw

GREEDY_BELOW = 1e-5  # a lower temperature is greedy: dividing by it would leave the range of float32


class Sampled(NamedTuple):
    """The chosen token, and its logprobs if they were asked for."""

    token: int
    logprobs: RankedLogprobs | None = None


class RequestSampler:
    """What one choice of a request does with its logits. Only samplers that its parameters turn on are in the chain."""

    def __init__(
        self, params: SamplingParams, *, prompt: Sequence[int] = (), ending: Iterable[int] = (), index: int = 0
    ) -> None:
        """`ending`: tokens that end the output, for min_tokens; `index`: which of the request's choices this is."""
        self.num_logprobs = params.logprobs
        self._params = params
        self._adjusters = _adjusters(params, prompt, ending)
        self._is_greedy = params.temperature < GREEDY_BELOW
        self._truncations = [] if self._is_greedy else _truncations(params)
        self._generator = None if self._is_greedy else request_generator(params.seed, index)

    def sample(self, logits: FloatArray) -> Sampled | None:
        """The next token of a row [V], which is not modified. None if the model's logits are not numbers."""
        adjusted = logits
        if self._adjusters:
            adjusted = logits.copy()
            for adjuster in self._adjusters:
                adjuster.apply(adjusted)
        token = int(adjusted.argmax())  # NaN counts as the maximum
        if not math.isfinite(adjusted[token]):
            return None
        if self._generator is not None:
            candidates = Candidates(None, adjusted)
            for truncation in self._truncations:
                candidates = truncation(candidates)
            token = draw(candidates, self._generator)
        for adjuster in self._adjusters:
            adjuster.observe(token)
        if self.num_logprobs is None:
            return Sampled(token)
        return Sampled(token, ranked_logprobs(logits, token, self.num_logprobs))

    def device_draw(self) -> TokenDraw | None:
        """The next draw for a GPU to make, or None if only `sample` can do what the request asks for."""
        if self._adjusters or self.num_logprobs is not None:
            return None
        if self._generator is None:
            return TokenDraw()
        params = self._params
        return TokenDraw(self._generator.random(), params.temperature, params.top_p, params.min_p, max(params.top_k, 0))


def sample(logits: Tensor, samplers: Sequence[RequestSampler]) -> list[Sampled | None]:
    """One token for each row of logits [R, V], each by its own sampler.

    Row by row on purpose: besides isolating requests it gives the same bits whatever else is in the batch, and numpy
    on one row costs 3 us (greedy) to 120 us (top-p) at a vocabulary of 49,152, far below a forward.
    """
    rows = logits.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return [sampler.sample(row) for sampler, row in zip(samplers, rows, strict=True)]


def _adjusters(params: SamplingParams, prompt: Sequence[int], ending: Iterable[int]) -> list[Adjuster]:
    adjusters: list[Adjuster] = []
    if params.repetition_penalty != 1:
        adjusters.append(RepetitionPenalty(params.repetition_penalty, prompt))
    if params.frequency_penalty:
        adjusters.append(FrequencyPenalty(params.frequency_penalty))
    if params.presence_penalty:
        adjusters.append(PresencePenalty(params.presence_penalty))
    if params.min_tokens:
        adjusters.append(MinTokens(params.min_tokens, ending))
    return adjusters


def _truncations(params: SamplingParams) -> list[Truncation]:
    """In the order temperature, min-p, top-k, top-p. Top-k stands first: it commutes with the former two, and after it
    there is little left to do."""
    truncations: list[Truncation] = []
    if params.top_k > 0:
        truncations.append(TopK(params.top_k))
    if params.temperature != 1:
        truncations.append(Temperature(params.temperature))
    if params.min_p > 0:
        truncations.append(MinP(params.min_p))
    if params.top_p < 1:
        truncations.append(TopP(params.top_p))
    return truncations
