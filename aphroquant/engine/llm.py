"""The engine for Python programs: prompts in, finished texts out.

llm = LLM("model-awq")
llm.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0))[0].text
llm.chat([{"role": "user", "content": "Hello!"}])[0].text
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aphroquant.engine.engine import Engine
from aphroquant.engine.prompts import Messages, chat_prompt, text_prompt
from aphroquant.engine.types import Delta, EngineConfig, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from aphroquant.errors import RequestError

ShowProgress = Callable[[int, int], None]  # choices finished, choices in all


@dataclass(frozen=True)
class Usage:
    """Tokens of one generation. `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Generation:
    """One finished choice: number `index` of those asked for by SamplingParams.n for prompt number `prompt_index`.

    `token_ids` include the token that ended it, `text` does not. With finish_reason "error", `error` says why.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    usage: Usage
    prompt_index: int = 0
    index: int = 0
    error: str | None = None


class LLM:
    """A model in this process. Keyword arguments are the fields of EngineConfig."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.engine = Engine(EngineConfig(model=str(model), **settings))
        self._num_requests = 0

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        progress: ShowProgress | None = None,
    ) -> list[Generation]:
        """Continue one prompt or several, given as text or as tokens; n generations a prompt, in order of prompts.

        Raises RequestError, before anything is generated, if one of the prompts can never run.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        tokens = [text_prompt(self.engine.tokenizer, p) if isinstance(p, str) else _token_ids(p) for p in several]
        return self._run(tokens, sampling or SamplingParams(), progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | None = None,
        *,
        progress: ShowProgress | None = None,
    ) -> list[Generation]:
        """Answer one conversation or several, each a list of {"role": ..., "content": ...}."""
        if isinstance(messages, str):
            raise RequestError("messages must be a list of {'role': ..., 'content': ...}, not a text", param="messages")
        conversations: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        tokens = [chat_prompt(self.engine.tokenizer, conversation) for conversation in conversations]
        return self._run(tokens, sampling or SamplingParams(), progress)

    def _run(
        self, prompts: list[list[int]], sampling: SamplingParams, progress: ShowProgress | None
    ) -> list[Generation]:
        collected: dict[tuple[str, int], _Collected] = {}
        request_ids: list[str] = []
        try:
            for prompt in prompts:
                request_ids.append(self._next_id())
                self.engine.add_request(
                    GenerationRequest(request_id=request_ids[-1], prompt_token_ids=prompt, sampling=sampling)
                )
                collected |= {(request_ids[-1], index): _Collected() for index in range(sampling.n)}
            self._drain(collected, progress)
        finally:  # after an error or an interruption nothing of this call may go on
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [
            collected[request_id, index].generation(prompt_index, index, with_logprobs=sampling.logprobs is not None)
            for prompt_index, request_id in enumerate(request_ids)
            for index in range(sampling.n)
        ]

    def _drain(self, collected: Mapping[tuple[str, int], _Collected], progress: ShowProgress | None) -> None:
        num_finished = 0
        while num_finished < len(collected):
            for delta in self.engine.step():
                if (delta.request_id, delta.index) not in collected:
                    continue  # the end of an earlier call's aborted request
                collected[delta.request_id, delta.index].deltas.append(delta)
                if delta.finish_reason is not None:
                    num_finished += 1
                    if progress is not None:
                        progress(num_finished, len(collected))

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"llm-{self._num_requests}"


@dataclass
class _Collected:
    """The deltas of one choice."""

    deltas: list[Delta] = field(default_factory=list)

    def generation(self, prompt_index: int, index: int, *, with_logprobs: bool) -> Generation:
        last = self.deltas[-1]
        assert last.finish_reason is not None
        token_ids = _joined(delta.token_ids for delta in self.deltas)
        return Generation(
            text="".join(delta.text for delta in self.deltas),
            token_ids=token_ids,
            finish_reason=last.finish_reason,
            logprobs=_joined(delta.logprobs for delta in self.deltas) if with_logprobs else None,
            usage=Usage(last.num_prompt_tokens, len(token_ids), last.num_cached_tokens),
            prompt_index=prompt_index,
            index=index,
            error=last.error,
        )


def _token_ids(prompt: object) -> list[int]:
    """A prompt given as tokens: integers of any library, but no floats and no truth values."""
    if not isinstance(prompt, Iterable):
        raise RequestError(
            f"a prompt must be a text or a list of token ids, not {type(prompt).__name__};"
            " the token ids of a single prompt are a list in a list",
            param="prompt",
        )
    token_ids = list(prompt)
    bad = next((token for token in token_ids if isinstance(token, bool) or not hasattr(token, "__index__")), None)
    if bad is not None:
        raise RequestError(f"prompt: {bad!r} is not a token id", param="prompt")
    return [operator.index(token) for token in token_ids]


def _joined(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]
