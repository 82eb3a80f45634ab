"""One HTTP request on its way through the engine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from aphroquant.engine.types import NOT_NUMBERS, NOT_NUMBERS_HINT, Delta, GenerationRequest, SamplingParams
from aphroquant.errors import RequestError
from aphroquant.server.engine_client import EngineClient
from aphroquant.server.metrics import Metrics
from aphroquant.server.prompts import Prompts
from aphroquant.server.responses import ChoiceFinish, PromptTokensDetails, Usage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What all requests share."""

    engine: EngineClient
    prompts: Prompts
    metrics: Metrics
    model_name: str
    started: int  # seconds since 1970

    @property
    def max_model_len(self) -> int:
        return self.engine.ready.max_model_len


class ChoiceDelta(NamedTuple):
    """News of one choice; choices are numbered over all prompts of the request."""

    choice: int
    delta: Delta
    finish_reason: ChoiceFinish | None


class Generation:
    """The choices of one HTTP request: their deltas in one stream, with usage and metrics kept on the way."""

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        *,
        kind: str,
        prompt_param: str,
        salt: str = "",
    ) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = service.model_name
        self._service = service
        self._sampling = sampling
        self._arrival = time.perf_counter()
        self._prompt_lens = [len(prompt) for prompt in prompts]
        self._cached = [0] * len(prompts)
        self._num_generated = 0
        self._last_token: dict[int, float] = {}  # when a choice had its latest tokens
        self._first: ChoiceDelta | None = None
        for prompt in prompts:
            _check_fits(len(prompt), sampling.max_tokens, service.max_model_len, prompt_param)
        self._requests = [
            GenerationRequest(
                request_id=f"{self.id}-{number}", prompt_token_ids=prompt, sampling=sampling, cache_salt=salt
            )
            for number, prompt in enumerate(prompts)
        ]
        self._numbers = {request.request_id: number for number, request in enumerate(self._requests)}
        self._stream = self._run()

    @property
    def num_choices(self) -> int:
        return len(self._requests) * self._sampling.n

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        num_prompt = sum(self._prompt_lens)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_generated,
            total_tokens=num_prompt + self._num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)),
        )

    async def start(self) -> None:
        """Wait for the first news, so that what the engine refuses is known before an answer begins."""
        self._first = await anext(self._stream)

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """The news of all choices until they are finished; RequestError if the engine fails."""
        if self._first is not None:
            yield self._first
        async for news in self._stream:
            yield news

    async def aclose(self) -> None:
        """Abort what is unfinished."""
        await self._stream.aclose()

    async def _run(self) -> AsyncGenerator[ChoiceDelta, None]:
        outcome = "cancelled"
        try:
            async with aclosing(self._service.engine.stream(self._requests)) as stream:
                async for delta in stream:
                    yield self._news(delta)
            outcome = "ok"
        except RequestError:
            outcome = "failed"  # counted by whoever turns it into an answer
            raise
        finally:
            self._ended(outcome)

    def _ended(self, outcome: str) -> None:
        seconds = time.perf_counter() - self._arrival
        if outcome != "failed":
            self._service.metrics.request_ended(outcome, seconds if outcome == "ok" else None)
        num_prompt, num_generated = sum(self._prompt_lens), self._num_generated
        logger.info("%s: %s, %d + %d tokens, %.2f s", self.id, outcome, num_prompt, num_generated, seconds)

    def _news(self, delta: Delta) -> ChoiceDelta:
        finish = delta.finish_reason
        if finish == "abort" or finish == "error":
            advice = f"; {NOT_NUMBERS_HINT}" if delta.error == NOT_NUMBERS else ""
            logger.error("%s: the engine ended it with %s: %s%s", self.id, finish, delta.error, advice)
            raise RequestError("the model failed on this request; the server's log says why", status=500)
        number = self._numbers[delta.request_id]
        choice = number * self._sampling.n + delta.index
        if delta.token_ids:
            self._count(number, choice, delta)
        return ChoiceDelta(choice, delta, finish)

    def _count(self, number: int, choice: int, delta: Delta) -> None:
        now = time.perf_counter()
        num_tokens = len(delta.token_ids)
        self._num_generated += num_tokens
        if choice in self._last_token:
            self._service.metrics.next_tokens(num_tokens, now - self._last_token[choice])
        else:
            self._service.metrics.first_tokens(num_tokens, now - self._arrival)
        if delta.index == 0 and choice not in self._last_token:
            self._cached[number] = delta.num_cached_tokens
            self._service.metrics.prompt(self._prompt_lens[number], delta.num_cached_tokens)
        self._last_token[choice] = now


def _check_fits(num_prompt: int, max_tokens: int | None, max_model_len: int, param: str) -> None:
    """Refuse what the model's context cannot hold, before the engine sees it."""
    if not num_prompt:
        raise RequestError(f"{param} must have at least one token", param=param)
    num_asked = 1 if max_tokens is None else max_tokens
    if num_prompt + num_asked > max_model_len:
        asked = "at least 1 is generated" if max_tokens is None else f"max_tokens asks for {max_tokens}"
        raise RequestError(
            f"the model's context holds {max_model_len} tokens, but the prompt has {num_prompt} and {asked}",
            param=param if num_prompt >= max_model_len else "max_tokens",
            code="context_length_exceeded",
        )
