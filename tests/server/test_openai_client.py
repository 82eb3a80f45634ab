"""The official client, synchronous and asynchronous, streaming and not, against a server with the fake engine."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest


def words(prompt: str, count: int, index: int = 0, seed: int | None = None) -> str:
    """What the fake engine answers."""
    digest = zlib.crc32(prompt.encode() + bytes([index]) + str(seed).encode())
    return "".join(f"{digest:08x}.{number} " for number in range(count))


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


USER = [{"role": "user", "content": "Hello"}]
RENDERED = "<user>Hello<assistant>"


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; 'fake' is"):
        client.models.retrieve("other")


def test_a_chat_answer_is_complete(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == words(RENDERED, 5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == len(RENDERED) + 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER).choices[0].message
    history = [*USER, answer.model_dump(), {"role": "user", "content": "More"}]
    second = client.chat.completions.create(model="fake", messages=history, max_tokens=1)
    rendered = f"<user>Hello<assistant>{answer.content}<user>More<assistant>"
    assert second.choices[0].message.content == words(rendered, 1)


def test_a_streamed_chat_has_the_same_text(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="fake", messages=USER, stream=True, n=2, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == words(RENDERED, 8, index)
        assert [choice.finish_reason for choice in choices][-2:] == [None, "length"]


def test_the_streaming_helper_accumulates_a_whole_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=USER, stop=".5") as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == words(RENDERED, 6)[: -len(".5 ")]


def test_content_may_come_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=1)
    assert answer.choices[0].message.content == words("<system>Be kind<user>Hel\nlo<assistant>", 1)


def test_template_switches_reach_the_template(client: openai.OpenAI) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = client.chat.completions.create(model="fake", messages=USER, max_tokens=1, extra_body=options)
    assert answer.choices[0].message.content == words("<user>Hello<thinking False><assistant>", 1)


def test_chat_logprobs_have_tokens_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=USER, logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    first, second = answer.choices[0].logprobs.content
    assert first.logprob == -9999.0  # the fake engine says minus infinity
    assert second.logprob == -0.5
    assert second.token == words(RENDERED, 2)[len(words(RENDERED, 1)) :]
    assert bytes(second.bytes).decode() == second.token
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("t0", 0.0), ("t1", -1.0)]


def test_streamed_chat_logprobs_come_with_their_tokens(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="fake", messages=USER, logprobs=True, stream=True) as stream:
        contents = [chunk.choices[0].logprobs.content for chunk in stream if chunk.choices[0].logprobs]
    assert [len(content) for content in contents] == [1] * 8


def test_stop_strings_and_seeds_reach_the_engine(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, stop=".3", seed=7)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == words(RENDERED, 4, seed=7)[: -len(".3 ")]


def test_a_completion_continues_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="Once upon", max_tokens=3)
    assert answer.choices[0].text == words("Once upon", 3)
    assert answer.object == "text_completion"
    assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16


def test_completions_of_several_prompts_keep_their_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["ab", "cd"], n=2, max_tokens=2)
    expected = [words(prompt, 2, index) for prompt in ("ab", "cd") for index in (0, 1)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]], ["Hi"], "Hi"])
def test_prompts_may_be_text_or_token_ids(client: openai.OpenAI, prompt: Any) -> None:
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=1, echo=True)
    assert answer.choices[0].text == "Hi" + words("Hi", 1)


def test_a_streamed_completion_has_the_same_text(client: openai.OpenAI) -> None:
    with client.completions.create(
        model="fake", prompt=["ab", "cd"], stream=True, max_tokens=4, echo=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    for index, prompt in enumerate(("ab", "cd")):
        texts = [choice.text for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(texts) == prompt + words(prompt, 4)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 6


def test_completion_logprobs_lie_side_by_side(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model="fake", prompt="ab", logprobs=2, max_tokens=3).choices[0].logprobs
    assert "".join(logprobs.tokens) == words("ab", 3)
    assert logprobs.token_logprobs == [-9999.0, -0.5, -0.5]
    assert logprobs.top_logprobs == [{"t0": 0.0, "t1": -1.0}] * 3
    assert logprobs.text_offset == [0, 11, 22]


def test_streamed_completion_logprobs_continue_their_offsets(client: openai.OpenAI) -> None:
    with client.completions.create(model="fake", prompt="ab", logprobs=0, max_tokens=3, stream=True) as stream:
        offsets = [chunk.choices[0].logprobs.text_offset for chunk in stream]
    assert offsets == [[0], [11], [22]]


def test_an_error_in_the_engine_fails_only_its_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        client.completions.create(model="fake", prompt="ERROR")
    stream = client.completions.create(model="fake", prompt="ERROR", stream=True)
    with stream, pytest.raises(openai.APIError, match="the model failed on this request"):
        list(stream)
    assert client.completions.create(model="fake", prompt="fine", max_tokens=1).choices[0].text


def test_the_asynchronous_client_streams_many_answers_at_once(server: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": f"question {number}"}]
        stream = await client.chat.completions.create(model="fake", messages=messages, stream=True, max_tokens=20)
        async with stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*[ask(client, number) for number in range(32)])

    expected = [words(f"<user>question {number}<assistant>", 20) for number in range(32)]
    assert asyncio.run(ask_all()) == expected


def test_the_asynchronous_client_gets_whole_answers(server: Any) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await client.completions.create(model="fake", prompt="ab", max_tokens=2)

    assert asyncio.run(ask()).choices[0].text == words("ab", 2)
