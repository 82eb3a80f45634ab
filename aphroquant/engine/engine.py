"""The engine: requests in, one step of the model at a time, deltas out.

An error belongs to a request: one that cannot run is refused when it is added, one whose logits are no numbers or whose
forward fails ends with finish_reason "error", and the engine goes on. An engine lives in one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from aphroquant.engine.ahead import AheadRunner, BegunStep, KnownTokens
from aphroquant.engine.batch import pack, pack_ahead
from aphroquant.engine.block_manager import BlockManager
from aphroquant.engine.choice import Choice
from aphroquant.engine.detokenizer import DetokenizerFactory
from aphroquant.engine.loading import LoadedModel, load_model
from aphroquant.engine.sampling import RankedLogprobs, Sampled
from aphroquant.engine.scheduler import Scheduled, Scheduler
from aphroquant.engine.sequence import State
from aphroquant.engine.types import (
    NOT_NUMBERS,
    Delta,
    EngineConfig,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenLogprobs,
)
from aphroquant.errors import RequestError

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests on one model. Call `step` while `has_unfinished`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: LoadedModel | None = None,
    ) -> None:
        """`tokenizer` instead of the checkpoint's own; `model` instead of loading `config.model`."""
        model = model or load_model(config, tokenizer)
        self.config = config
        self.tokenizer = model.tokenizer
        self.runner_choice = model.runner_choice
        self.max_model_len = model.max_model_len
        self.vocab_size = model.vocab_size
        self.kv_capacity_tokens = model.num_kv_blocks * config.block_size
        self._model = model
        self._ahead = model.runner if isinstance(model.runner, AheadRunner) else None
        self._detokenizers = DetokenizerFactory(model.tokenizer)
        self._blocks = BlockManager(
            model.num_kv_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._scheduler: Scheduler[Choice] = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or model.batched_tokens,
        )
        self._requests: dict[str, list[Choice]] = {}  # unfinished choices
        self._news: list[Delta] = []  # for the next step
        self._begun: list[BegunStep] = []  # ahead of the step whose news were given last
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def add_request(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError, naming the parameter, if it can never run."""
        self._check(request)
        params = request.sampling
        prompt_len = len(request.prompt_token_ids)
        max_len = self.max_model_len if params.max_tokens is None else prompt_len + params.max_tokens
        choices: list[Choice] = []
        for index in range(params.n):
            choice = Choice(
                request,
                index,
                max_len=max_len,
                ending_tokens=self._model.ending_tokens,
                detokenizers=self._detokenizers,
                leader=choices[0] if choices and self.config.enable_prefix_caching else None,
            )
            choices.append(choice)
            self._scheduler.add(choice)
        self._requests[request.request_id] = choices
        self._num_prompt_tokens += prompt_len

    def abort(self, request_id: str) -> None:
        """End a request; each of its unfinished choices has one more delta, "abort". Unknown ids are ignored."""
        for choice in list(self._requests.get(request_id, ())):
            self._finish(choice)
            self._news.append(self._delta(choice, text=choice.text.finish(), finish_reason="abort"))

    def has_unfinished(self) -> bool:
        """True while a step has something to do or to tell."""
        return bool(self._news) or self._scheduler.has_unfinished

    def step(self) -> list[Delta]:
        """Compute one batch and give the news of every choice that got a token or ended."""
        news, self._news = self._news, []
        begun = [step for step in self._begun if step.is_wanted] or self._begin()
        self._begun = self._begin_ahead(begun)
        for step in begun:
            news += self._complete(step)
        return news

    def stats(self) -> EngineStats:
        """Figures for metrics and logs."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_total=self._blocks.num_blocks,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generated_tokens,
            preemptions=scheduler.num_preemptions,
        )

    def check(self) -> None:
        """Assert that the books of requests, sequences and blocks agree."""
        self._scheduler.check()
        unfinished = {choice for choices in self._requests.values() for choice in choices}
        assert unfinished == set(self._scheduler), "requests and scheduler disagree"

    def _begin(self) -> list[BegunStep]:
        """The next step."""
        step = self._scheduler.schedule()
        return list(self._forward(step)) if step else []

    def _forward(self, part: list[Scheduled[Choice]]) -> Iterator[BegunStep]:
        """One forward for all; if it fails, one for each, and the error of those that fail alone."""
        complete = [scheduled.sequence for scheduled in part if scheduled.is_complete]
        try:
            logits = self._model.runner.forward(pack(part, self.config.block_size))
        except (RuntimeError, MemoryError) as error:
            logger.exception("a forward of %d sequences failed", len(part))
            if len(part) > 1:
                for scheduled in part:
                    yield from self._forward([scheduled])
                return
            yield BegunStep(part, complete, str(error) or type(error).__name__)
            return
        begin_sampling = self._ahead.begin_sampling if self._ahead else KnownTokens
        yield BegunStep(part, complete, begin_sampling(logits, [choice.sampler for choice in complete]))

    def _begin_ahead(self, begun: list[BegunStep]) -> list[BegunStep]:
        """The decode step after the one that has begun, if all that it lacks are the tokens of that one."""
        if self._ahead is None or len(begun) != 1:
            return []
        step = begun[0]
        tokens = None if isinstance(step.outcome, str) else step.outcome.on_device
        rows = [
            row
            for row, choice in enumerate(step.complete)
            if choice.state is State.RUNNING and not choice.ends_with_next
        ]
        choices = [step.complete[row] for row in rows]
        if tokens is None or not self._scheduler.make_room_ahead(step.part, choices):
            return []
        try:
            logits = self._ahead.forward_ahead(pack_ahead(choices, self.config.block_size), tokens, rows)
        except (RuntimeError, MemoryError):
            logger.exception("a forward of %d sequences failed; they are tried again", len(choices))
            return []
        outcome = self._ahead.begin_sampling(logits, [choice.sampler for choice in choices])
        return [BegunStep([Scheduled(choice, 1) for choice in choices], choices, outcome)]

    def _complete(self, step: BegunStep) -> list[Delta]:
        """Account for computed tokens, and take the sampled ones of sequences that have not ended meanwhile."""
        running = [scheduled for scheduled in step.part if scheduled.sequence.state is State.RUNNING]
        if isinstance(step.outcome, str):
            reason = f"the forward failed: {step.outcome}"
            return [self._fail(scheduled.sequence, reason) for scheduled in running]
        self._scheduler.computed(running)
        results = zip(step.complete, step.outcome.result(), strict=True)
        return [self._accept(choice, sampled) for choice, sampled in results if choice.state is State.RUNNING]

    def _accept(self, choice: Choice, sampled: Sampled | None) -> Delta:
        if sampled is None:
            return self._fail(choice, NOT_NUMBERS)
        self._num_generated_tokens += 1
        text, finish_reason = choice.accept(sampled.token)
        if finish_reason is not None:
            self._finish(choice)
        return self._delta(choice, sampled, text=text, finish_reason=finish_reason)

    def _fail(self, choice: Choice, reason: str) -> Delta:
        self._finish(choice, reusable=False)
        return self._delta(choice, text=choice.text.finish(), finish_reason="error", error=reason)

    def _finish(self, choice: Choice, *, reusable: bool = True) -> None:
        self._scheduler.finish(choice, reusable=reusable)
        choices = self._requests[choice.request_id]
        choices.remove(choice)
        if not choices:
            del self._requests[choice.request_id]

    def _delta(
        self,
        choice: Choice,
        sampled: Sampled | None = None,
        *,
        text: str,
        finish_reason: FinishReason | None,
        error: str | None = None,
    ) -> Delta:
        logprobs = sampled.logprobs if sampled else None
        return Delta(
            request_id=choice.request_id,
            index=choice.index,
            text=text,
            token_ids=[sampled.token] if sampled else [],
            logprobs=[self._token_logprobs(sampled.token, logprobs)] if sampled and logprobs else [],
            finish_reason=finish_reason,
            error=error,
            num_prompt_tokens=choice.num_prompt_tokens,
            num_cached_tokens=choice.num_cached_tokens,
        )

    def _token_logprobs(self, token: int, logprobs: RankedLogprobs) -> TokenLogprobs:
        text_of = self._detokenizers.token_text
        return TokenLogprobs(
            (token, logprobs.chosen, text_of(token)),
            [(other, logprob, text_of(other)) for other, logprob in logprobs.top],
        )

    def _check(self, request: GenerationRequest) -> None:
        params, prompt = request.sampling, request.prompt_token_ids
        params.validate()
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is already running", param="request_id")
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        self._check_tokens("prompt", prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        wanted = len(prompt) + (params.max_tokens or 1)
        if wanted > self.max_model_len:
            output = f"{params.max_tokens or 'at least 1'} of output"
            raise RequestError(
                f"{len(prompt)} prompt tokens and {output} are {wanted} tokens, but the model's context holds "
                f"{self.max_model_len}",
                param="max_tokens" if len(prompt) < self.max_model_len else "prompt",
                code="context_length_exceeded",
            )

    def _check_tokens(self, param: str, tokens: list[int] | tuple[int, ...]) -> None:
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._model.vocab_size):
            bad = next(token for token in tokens if not 0 <= token < self._model.vocab_size)
            raise RequestError(
                f"{param}: token id {bad} must be between 0 and {self._model.vocab_size - 1}", param=param
            )
