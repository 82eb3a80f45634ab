"""Reading bodies within limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from aphroquant.errors import RequestError
from aphroquant.server import bodies
from aphroquant.server.bodies import read_json
from aphroquant.server.protocol import CompletionRequest


def request(receive: Any) -> Request:
    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def test_a_body_that_does_not_arrive_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    chunks = [{"type": "http.request", "body": b'{"prompt"', "more_body": True}]

    async def receive() -> Any:
        if not chunks:
            await asyncio.sleep(10)
        return chunks.pop()

    with pytest.raises(RequestError, match=r"the body did not arrive within 0\.05 s") as caught:
        asyncio.run(read_json(request(receive), CompletionRequest))
    assert caught.value.status == 408


def test_a_large_body_is_parsed_beside_the_event_loop() -> None:
    body = b'{"prompt": "' + b"x" * (2 * bodies.INLINE_BYTES) + b'"}'

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    parsed = asyncio.run(read_json(request(receive), CompletionRequest))
    assert len(parsed.prompts[0]) == 2 * bodies.INLINE_BYTES
