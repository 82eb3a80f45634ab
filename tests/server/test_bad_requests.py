"""Bad requests over raw HTTP: each gets a JSON error in the API's form, and the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON = {"content-type": "application/json"}
POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"{}", b'{"x": NaN}', b"[" * 9999])
def test_a_body_that_is_no_request_gets_a_400(server: Any, path: str, body: bytes) -> None:
    error_of(server.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_another_content_type_gets_a_400(server: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert "content-type must be application/json" in error_of(answer, 400)["message"]


def test_a_content_type_may_name_its_charset(server: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 200


def test_an_unknown_model_gets_a_404(server: Any) -> None:
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})):
        error = error_of(server.post(path, {**body, "model": "gpt-7"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_an_unknown_route_or_method_gets_an_error_in_the_apis_form(server: Any) -> None:
    assert error_of(server.get("/v1/engines"), 404)["message"] == "GET /v1/engines: not found"
    assert error_of(server.get("/v1/completions"), 405)["message"] == "GET /v1/completions: method not allowed"


@pytest.mark.parametrize("max_tokens", [None, 1, 100])
def test_a_prompt_that_is_too_long_gets_its_own_code(server: Any, max_tokens: int | None) -> None:
    body = {"prompt": [65] * 512, "max_tokens": max_tokens}
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "holds 512 tokens, but the prompt has 512" in error["message"]


def test_an_answer_that_would_be_too_long_gets_a_400(server: Any) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "x" * 500, "max_tokens": 13}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert server.post("/v1/completions", {"prompt": "x" * 500, "max_tokens": 12}).status_code == 200


def test_a_very_long_text_is_refused_before_it_is_tokenized(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 2_000_000}]}
    error = error_of(server.post("/v1/chat/completions", body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "2000000 characters" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_without_tokens_gets_a_400(server: Any, stream: bool) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "", "stream": stream}), 400)
    assert error["message"] == "prompt must have at least one token"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_gets_a_400(server: Any, stream: bool) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "REJECT", "stream": stream}), 400)
    assert error["message"] == "the prompt can never fit the KV cache"
    assert (error["param"], error["code"]) == ("prompt", "too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_an_internal_error_says_nothing_of_the_inside(server: Any, stream: bool) -> None:
    answer = server.post("/v1/completions", {"prompt": "BROKEN", "stream": stream})
    assert error_of(answer, 500)["message"] == "internal error"
    assert "secret detail" not in answer.text
    assert "secret detail" in server.log.read_text()
    assert server.post("/v1/completions", {"prompt": "fine"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("REFUSE", "messages do not fit the model's chat template: no such roles"),
        ("DIVIDE", "the chat template failed on these messages"),
        (
            "ESCAPE",
            "messages do not fit the model's chat template: access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_a_template_that_fails_is_the_requests_fault(server: Any, content: str, message: str) -> None:
    body = {"messages": [{"role": "user", "content": content}]}
    error = error_of(server.post("/v1/chat/completions", body), 400)
    assert (error["message"], error["param"]) == (message, "messages")


def test_a_body_over_the_limit_gets_a_413(server: Any) -> None:
    address = urlsplit(server.url)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{}Content-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall((head.format(f"Content-Length: {2**25 + 1}\r\n") + "\r\n").encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_grows_over_the_limit_gets_a_413(server: Any) -> None:
    def chunks() -> Any:
        yield b'{"prompt": "'
        for _ in range(32):
            yield b"x" * 2**20

    answer = server.post("/v1/completions", content=chunks(), headers=JSON)
    assert error_of(answer, 413)["code"] == "body_too_large"


def test_headers_over_the_limit_get_a_400(server: Any) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_full_server_sends_new_requests_away(start_server: Any) -> None:
    server = start_server({"max_open": 4})
    body = {"prompt": "SLOW", "n": 3, "max_tokens": 400, "stream": True}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        refused = server.post("/v1/completions", {"prompt": "ab", "n": 2})
        assert error_of(refused, 503)["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert server.post("/v1/completions", {"prompt": "ab"}).status_code == 200
    server.wait_for_metric("aphroquant_requests_running", 0)
    assert server.post("/v1/completions", {"prompt": "ab", "n": 4}).status_code == 200


def test_texts_and_tokens_convert_both_ways(server: Any) -> None:
    text = "Grüße 🙂"
    tokens = list(text.encode())
    answer = server.post("/tokenize", {"prompt": text}).json()
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 512}
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert bytes(chat["tokens"]) == b"<user>Hi<assistant>"
    error_of(server.post("/tokenize", {}), 400)
    assert server.post("/detokenize", {"tokens": [2**31 - 1]}).status_code in (200, 400)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
names = st.sampled_from(
    ["prompt", "messages", "n", "max_tokens", "temperature", "top_p", "top_k", "stop", "logprobs", "seed", "stream",
     "stream_options", "model", "echo", "tokens", "best_of", "response_format", "cache_salt", "min_tokens"]
) | st.text(max_size=5)  # fmt: skip
bodies = st.binary(max_size=60) | st.builds(
    lambda fields: json.dumps(fields).encode(), st.dictionaries(names, anything, max_size=4)
)
valid = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(POSTS), body=bodies)
def test_no_body_breaks_the_server(server: Any, path: str, body: bytes) -> None:
    answer = server.post(path, content=body, headers=JSON)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        error_of(answer, answer.status_code)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(POSTS), name=names, value=anything)
def test_no_field_breaks_the_server(server: Any, path: str, name: str, value: Any) -> None:
    body = json.dumps({**valid[path], name: value}).encode()
    answer = server.post(path, content=body, headers=JSON)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        error_of(answer, answer.status_code)


def test_the_server_is_well_after_all_this(server: Any) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.post("/v1/completions", {"prompt": "fine"}).status_code == 200
    server.wait_for_metric("aphroquant_requests_running", 0)
