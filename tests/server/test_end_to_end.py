"""`aphroquant serve` with its real engine on a tiny random checkpoint."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def tiny_server(start_real_server: Any, tiny_checkpoint: Any) -> Any:
    """The reference backend computes the same on every machine."""
    return start_real_server(tiny_checkpoint("llama"), "--backend", "reference", "--served-model-name", "tiny")


@pytest.fixture
def client(tiny_server: Any) -> Any:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_greedy_text_is_that_of_transformers(client: openai.OpenAI, tiny_checkpoint: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([tokenizer("The capital of France")["input_ids"]])
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    answer = client.completions.create(model="tiny", prompt=prompt[0].tolist(), **GREEDY)
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def ask_alone_and_together(server: Any, questions: list[str], max_tokens: int) -> tuple[list[str], list[str]]:
    """Greedy streamed answers to chat questions, asked one after the other and then all at once."""

    async def ask(client: openai.AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            stream=True,
            temperature=0,
            max_tokens=max_tokens,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await ask(client, question) for question in questions]
            return alone, await asyncio.gather(*[ask(client, question) for question in questions])

    return asyncio.run(ask_all())


def test_32_concurrent_streams_each_get_their_own_answer(tiny_server: Any) -> None:
    questions = [f"Question {number}: what is {number} + {3 * number}?" for number in range(32)]
    alone, together = ask_alone_and_together(tiny_server, questions, 24)
    assert together == alone
    assert len(set(alone)) > 24  # the tiny model does answer differently


@pytest.mark.sample_model
def test_32_concurrent_streams_of_a_real_model_each_get_their_own_answer(
    start_real_server: Any, sample_model: Any
) -> None:
    limits = ("--max-model-len", "512", "--kv-cache-memory", "512MiB", "--no-prefix-caching")
    server = start_real_server(sample_model, "--served-model-name", "tiny", *limits)
    questions = [f"Tell me one fact about the number {number}." for number in range(32)]
    alone, together = ask_alone_and_together(server, questions, 8)
    assert together == alone
    assert len(set(alone)) > 24


def test_a_stream_and_a_whole_answer_agree(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2, **GREEDY)
    with client.chat.completions.create(
        model="tiny", messages=messages, stream=True, logprobs=True, top_logprobs=2, **GREEDY
    ) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    logprobs = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in logprobs] == [token.token for token in whole.choices[0].logprobs.content]
    assert len(logprobs) == whole.usage.completion_tokens
    assert all(token.logprob == token.top_logprobs[0].logprob for token in logprobs)  # greedy takes the best


def test_a_seed_repeats_the_samples(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="Once", seed=seed, n=3, max_tokens=12, temperature=1.2)
        return [choice.text for choice in answer.choices]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len(set(sample(1))) == 3


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="Once upon a time", **GREEDY).choices[0].text
    stop = text[5:8]
    choice = client.completions.create(model="tiny", prompt="Once upon a time", stop=stop, **GREEDY).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_repeated_prompt_is_taken_from_the_cache(client: openai.OpenAI) -> None:
    def cached(**fields: Any) -> int:
        answer = client.completions.create(model="tiny", prompt="word " * 40, max_tokens=1, extra_body=fields)
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    assert cached() == 0
    assert cached() >= 32
    assert cached(cache_salt="mine") == 0  # another salt shares nothing


def test_token_ids_outside_the_vocabulary_get_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 99999 must be between 0 and 383"):
        client.completions.create(model="tiny", prompt=[5, 99999], max_tokens=1)
    assert client.completions.create(model="tiny", prompt=[5], max_tokens=1).usage.prompt_tokens == 1


def test_a_client_that_leaves_frees_its_memory(tiny_server: Any) -> None:
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 4}
    generated = tiny_server.metric("aphroquant_engine_generation_tokens_total")
    with tiny_server.client.stream("POST", f"{tiny_server.url}/v1/completions", json=body) as response:
        next(response.iter_raw())
    tiny_server.wait_for_metric("aphroquant_requests_running", 0)
    assert tiny_server.metric("aphroquant_kv_cache_blocks_used") == 0
    assert tiny_server.metric("aphroquant_engine_generation_tokens_total") < generated + 4 * 500


def test_control_tokens_in_a_message_are_plain_text(tiny_server: Any) -> None:
    def count(content: str) -> int:
        body = {"messages": [{"role": "user", "content": content}]}
        return int(tiny_server.post("/tokenize", body).json()["count"])

    assert count("<|im_end|>") > count("a") + 3
