"""POST /v1/completions: texts in, their continuations out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from aphroquant.engine.types import TokenLogprobs
from aphroquant.server.generation import ChoiceDelta, Generation, Service
from aphroquant.server.logprobs import completion_logprobs
from aphroquant.server.protocol import CompletionRequest
from aphroquant.server.responses import ChoiceFinish, Completion, CompletionChoice, CompletionLogprobs, Usage


@dataclass
class TextCompletion:
    """A request's generation, and for each choice what is known of it so far."""

    request: CompletionRequest
    generation: Generation
    choices: list[_Choice]


@dataclass
class _Choice:
    echo: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: ChoiceFinish = "stop"
    offset: int = 0  # of the next token in the text, by the tokens' own texts


async def start_completion(service: Service, request: CompletionRequest, salt: str) -> TextCompletion:
    """The request's generation, with the engine's first news in hand; RequestError if it cannot run."""
    sampling = request.sampling()
    encode, decode = service.prompts.encode, service.prompts.decode
    prompts = [await encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
    generation = Generation(service, prompts, sampling, kind="cmpl", prompt_param="prompt", salt=salt)
    choices = []
    for prompt in request.prompts:
        echo = "" if not request.echo else prompt if isinstance(prompt, str) else await decode(prompt)
        choices += [_Choice(echo=echo) for _ in range(sampling.n)]
    await generation.start()
    return TextCompletion(request, generation, choices)


async def full_completion(completion: TextCompletion) -> Completion:
    """All texts at once."""
    async for news in completion.generation.deltas():
        choice = completion.choices[news.choice]
        choice.texts.append(news.delta.text)
        choice.logprobs.extend(news.delta.logprobs)
        choice.finish_reason = news.finish_reason or choice.finish_reason
    choices = [
        CompletionChoice(
            index=index,
            text=choice.echo + "".join(choice.texts),
            logprobs=_logprobs(completion.request, choice, choice.logprobs),
            finish_reason=choice.finish_reason,
        )
        for index, choice in enumerate(completion.choices)
    ]
    return _completion(completion, choices, usage=completion.generation.usage)


async def completion_chunks(completion: TextCompletion) -> AsyncGenerator[Completion, None]:
    """The texts as they grow, an echoed prompt first; with `include_usage` the count at the end."""
    for index, choice in enumerate(completion.choices):
        if choice.echo:
            echo = CompletionChoice(index=index, text=choice.echo, logprobs=None, finish_reason=None)
            yield _completion(completion, [echo])
    async for news in completion.generation.deltas():
        if news.delta.text or news.delta.logprobs or news.finish_reason:
            yield _completion(completion, [_news(completion, news)])
    if completion.request.include_usage:
        yield _completion(completion, [], usage=completion.generation.usage)


def _news(completion: TextCompletion, news: ChoiceDelta) -> CompletionChoice:
    return CompletionChoice(
        index=news.choice,
        text=news.delta.text,
        logprobs=_logprobs(completion.request, completion.choices[news.choice], news.delta.logprobs),
        finish_reason=news.finish_reason,
    )


def _logprobs(request: CompletionRequest, choice: _Choice, tokens: list[TokenLogprobs]) -> CompletionLogprobs | None:
    if request.logprobs is None:
        return None
    logprobs = completion_logprobs(tokens, choice.offset)
    choice.offset += sum(len(text) for text in logprobs.tokens)
    return logprobs


def _completion(completion: TextCompletion, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
    generation = completion.generation
    answer = Completion(
        id=generation.id,
        object="text_completion",
        created=generation.created,
        model=generation.model,
        choices=choices,
    )
    if usage is not None or completion.request.include_usage:
        answer.usage = usage
    return answer
