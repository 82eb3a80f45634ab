"""API keys: every route but /health needs one of them."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest


@pytest.fixture(scope="module")
def guarded(start_server: Any) -> Any:
    return start_server({"api_keys": ["first-key", "second-key"]})


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens_the_server(guarded: Any, key: str) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="fake", prompt="ab", max_tokens=1).choices[0].text


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Bearer first-key2", "Bearer first-ke", "first-key",
     "Basic first-key", "Bearer first-key second-key", "Bearer \u00ff"],
)  # fmt: skip
def test_anything_else_gets_a_401(guarded: Any, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    answer = guarded.post("/v1/completions", {"prompt": "ab"}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/v1/models", "/v1/models/fake", "/tokenize", "/", "/docs", "/none", "/openapi.json", "/health/",
     "//health", "/health/../metrics", "/%68ealth2"],
)  # fmt: skip
def test_every_route_but_health_is_closed(guarded: Any, path: str) -> None:
    assert guarded.get(path).status_code == 401


def test_health_is_open(guarded: Any) -> None:
    assert guarded.get("/health").json() == {"status": "ok"}


def test_a_host_header_cannot_pose_as_the_path(guarded: Any) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x/health?\r\nConnection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_an_openai_client_with_a_wrong_key_is_told_so(guarded: Any) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="a valid API key is required"):
        client.models.list()


def test_keys_never_reach_the_log(guarded: Any) -> None:
    guarded.get("/metrics", headers={"authorization": "Bearer tried-key"})
    log = guarded.log.read_text()
    assert "first-key" not in log
    assert "tried-key" not in log
