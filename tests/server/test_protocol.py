"""Request bodies: what is understood, what is harmless, what is refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aphroquant.engine.types import SamplingParams
from aphroquant.errors import RequestError
from aphroquant.server.protocol import ChatCompletionRequest, CompletionRequest
from aphroquant.server.validation import parse

USER = {"role": "user", "content": "Hello"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(json.dumps({"messages": [USER], **fields}).encode(), ChatCompletionRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "Hello", **fields}).encode(), CompletionRequest)


def refusal(make: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make(**fields).sampling()
    return caught.value


def test_an_empty_chat_request_samples_by_default() -> None:
    assert chat().sampling() == SamplingParams()


def test_an_empty_completion_request_has_16_tokens() -> None:
    assert completion().sampling() == SamplingParams(max_tokens=16)


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {"n": 3, "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1,
              "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.3, "seed": -5,
              "stop_token_ids": [1, 2], "include_stop_str_in_output": True, "ignore_eos": True}  # fmt: skip
    expected = SamplingParams(**{**fields, "stop_token_ids": (1, 2), "stop": ("a", "b")})
    assert chat(**fields, stop=["a", "b"]).sampling() == expected
    assert completion(**fields, stop=["a", "b"]).sampling() == expected


def test_null_means_absent() -> None:
    names = set(ChatCompletionRequest.model_fields) - {"messages"}
    assert chat(**dict.fromkeys(names)).sampling() == SamplingParams()
    names = set(CompletionRequest.model_fields) - {"prompt"}
    assert completion(**dict.fromkeys(names)).sampling() == SamplingParams(max_tokens=16)


def test_one_stop_string_may_stand_alone() -> None:
    assert chat(stop="END").sampling().stop == ("END",)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 4}, 4), ({"logprobs": False}, None), ({}, None)],
)
def test_chat_logprobs_are_a_switch_and_a_number(fields: dict[str, Any], logprobs: int | None) -> None:
    assert chat(**fields).sampling().logprobs == logprobs


def test_completion_logprobs_are_a_number() -> None:
    assert completion(logprobs=0).sampling().logprobs == 0
    assert completion(logprobs=5).sampling().logprobs == 5


def test_max_completion_tokens_is_the_newer_name_of_max_tokens() -> None:
    assert chat(max_completion_tokens=7).sampling().max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).sampling().max_tokens == 7
    assert refusal(chat, max_completion_tokens=7, max_tokens=8).param == "max_completion_tokens"


@pytest.mark.parametrize(
    "fields",
    [{"user": "me"}, {"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"logit_bias": {}},
     {"response_format": {"type": "text"}}, {"parallel_tool_calls": True}, {"tools": []}, {"tool_choice": "none"},
     {"modalities": ["text"]}, {"stream_options": {"include_usage": True}}, {"prompt_cache_key": "k"},
     {"safety_identifier": "s"}],
)  # fmt: skip
def test_harmless_fields_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).sampling() == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
     ({"logit_bias": {"5": 1}}, "logit_bias"), ({"modalities": ["audio"]}, "modalities"),
     ({"reasoning_effort": "low"}, "reasoning_effort"), ({"audio": {}}, "audio"), ({"functions": [{}]}, "functions"),
     ({"prediction": {}}, "prediction")],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(chat, **fields)
    assert error.message == f"{param} is not supported"
    assert (error.param, error.code, error.status) == (param, "unsupported_parameter", 400)


def test_an_unknown_field_is_refused_with_the_nearest_known_one() -> None:
    error = refusal(chat, temprature=1)
    assert error.message == "unknown field 'temprature'. Did you mean 'temperature'?"
    assert error.param == "temprature"
    assert refusal(chat, zzzzzz=1).message == "unknown field 'zzzzzz'."


def test_a_long_field_name_is_not_echoed_in_full() -> None:
    assert len(refusal(chat, **{"x" * 100_000: 1}).message) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "1"}, "temperature: input should be a valid number"),
        ({"max_tokens": 1.5}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
        ({"max_tokens": 2**31}, "max_tokens: input should be less than 2147483648"),
        ({"n": 0}, "n: input should be greater than or equal to 1"),
        ({"n": 10**6}, "n: input should be less than or equal to 128"),
        ({"seed": 2**63}, "seed: input should be less than 9223372036854775808"),
        ({"temperature": -1}, "temperature = -1.0 must be between 0 and 100"),
        ({"temperature": float("nan")}, "temperature: input should be a finite number"),
        ({"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"top_k": -2}, "top_k = -2 must be -1 or 0 (off), or at least 1"),
        ({"stop": 5}, "stop: must be a text or a list of texts"),
        ({"stop": [""]}, "stop = '' must be non-empty strings"),
        ({"stop": ["x"] * 99}, "stop must have at most 16 items"),
        ({"stream": "yes"}, "stream: input should be a valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs = true"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: input should be 'text'"),
        ({"messages": []}, "messages must have at least 1 items"),
        ({"messages": "Hi"}, "messages: input should be a valid array"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is required"),
        ({"messages": [{**USER, "content": None}]}, "messages.0.content: must be a text or a list of text parts"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role: input should be 'system', 'developer', 'user' or 'assistant'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: input should be 'text'",
        ),
        ({"chat_template": "{{ 1 }}"}, "unknown field 'chat_template'. Did you mean 'chat_template_kwargs'?"),
        ({"chat_template_kwargs": {"tools": []}}, "unknown field 'chat_template_kwargs.tools'."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_field_and_rule(fields: dict[str, Any], message: str) -> None:
    assert refusal(chat, **fields).message == message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]), (["a", [1]], ["a", [1]])],
)
def test_the_spellings_of_a_prompt(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [1.5], [-1], [True], [2**31], {"a": 1}, [["a"]], [1, "a"]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    expected = "prompt: must be a text, a list of texts, token ids, or a list of token ids"
    assert refusal(completion, prompt=prompt).message == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": ["a"] * 129}, "prompt"), ({"prompt": ["a"] * 100, "n": 2}, "n"), ({"best_of": 2}, "best_of"),
     ({"echo": True, "logprobs": 1}, "echo"), ({"suffix": "x"}, "suffix"), ({"logprobs": 21}, "logprobs")],
)  # fmt: skip
def test_limits_of_completions(fields: dict[str, Any], param: str) -> None:
    assert refusal(completion, **fields).param == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON: EOF while parsing a value at line 1 column 0"),
        (b"[" * 100_000, "the body is not valid JSON: recursion limit exceeded at line 1 column 202"),
        (b"[]", "the body must be a JSON object"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON: invalid unicode code point at line 1 column 13"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "the body is not valid JSON: number out of range at line 1 column 4308"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, CompletionRequest)
    assert caught.value.message == message
