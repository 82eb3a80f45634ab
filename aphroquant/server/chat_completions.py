"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from aphroquant.engine.types import TokenLogprobs
from aphroquant.server.generation import ChoiceDelta, Generation, Service
from aphroquant.server.logprobs import chat_logprobs
from aphroquant.server.protocol import ChatCompletionRequest
from aphroquant.server.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChoiceFinish,
    Usage,
)


async def start_chat(service: Service, request: ChatCompletionRequest, salt: str) -> Generation:
    """The request's generation, with the engine's first news in hand; RequestError if it cannot run."""
    sampling = request.sampling()
    messages = [message.for_template() for message in request.messages]
    prompt = await service.prompts.encode_chat(messages, request.template_options())
    generation = Generation(service, [prompt], sampling, kind="chatcmpl", prompt_param="messages", salt=salt)
    await generation.start()
    return generation


@dataclass
class _Answer:
    """One choice on its way to completion."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: ChoiceFinish = "stop"


async def full_chat(request: ChatCompletionRequest, generation: Generation) -> ChatCompletion:
    """The whole answer at once."""
    answers = [_Answer() for _ in range(generation.num_choices)]
    async for news in generation.deltas():
        answer = answers[news.choice]
        answer.texts.append(news.delta.text)
        answer.logprobs.extend(news.delta.logprobs)
        answer.finish_reason = news.finish_reason or answer.finish_reason
    choices = [
        ChatChoice(
            index=index,
            message=ChatAnswer(content="".join(answer.texts)),
            logprobs=chat_logprobs(answer.logprobs) if request.logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return ChatCompletion(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        choices=choices,
        usage=generation.usage,
    )


async def chat_chunks(
    request: ChatCompletionRequest, generation: Generation
) -> AsyncGenerator[ChatCompletionChunk, None]:
    """The answer as it grows: first each choice's role, then its text, and with `include_usage` the count."""
    for index in range(generation.num_choices):
        yield _chunk(request, generation, [_choice(index, ChatDelta(role="assistant", content=""))])
    async for news in generation.deltas():
        if news.delta.text or news.delta.logprobs or news.finish_reason:
            yield _chunk(request, generation, [_news(request, news)])
    if request.include_usage:
        yield _chunk(request, generation, [], usage=generation.usage)


def _news(request: ChatCompletionRequest, news: ChoiceDelta) -> ChatChunkChoice:
    choice = _choice(news.choice, ChatDelta(content=news.delta.text) if news.delta.text else ChatDelta())
    choice.finish_reason = news.finish_reason
    if request.logprobs and news.delta.logprobs:
        choice.logprobs = chat_logprobs(news.delta.logprobs)
    return choice


def _choice(index: int, delta: ChatDelta) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def _chunk(
    request: ChatCompletionRequest,
    generation: Generation,
    choices: list[ChatChunkChoice],
    usage: Usage | None = None,
) -> ChatCompletionChunk:
    chunk = ChatCompletionChunk(
        id=generation.id,
        object="chat.completion.chunk",
        created=generation.created,
        model=generation.model,
        choices=choices,
    )
    if request.include_usage:
        chunk.usage = usage  # null in all chunks but the last
    return chunk
