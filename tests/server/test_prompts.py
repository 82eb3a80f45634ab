"""Tokenization beside the event loop: order, limits, failures."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from aphroquant.errors import RequestError
from aphroquant.server import prompts
from aphroquant.server.prompts import Prompts


class SlowTokenizer:
    """Takes its time until `go` is set, and remembers its threads."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.threads: set[str] = set()

    def get_vocab(self) -> dict[str, int]:
        return {"abcd": 0}

    def encode(self, text: str, **_: Any) -> list[int]:
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(10)
        return [len(text)]

    def decode(self, token_ids: list[int]) -> str:
        raise OverflowError("out of range integral type conversion attempted")


def test_the_event_loop_goes_on_while_prompts_are_tokenized_in_one_thread() -> None:
    tokenizer: Any = SlowTokenizer()

    async def encode() -> list[list[int]]:
        waiting = [asyncio.create_task(encoder.encode("x" * length)) for length in range(1, 9)]
        await asyncio.sleep(0.05)  # would not return if the loop were held up
        tokenizer.go.set()
        return list(await asyncio.gather(*waiting))

    encoder = Prompts(tokenizer, 100)
    assert asyncio.run(encode()) == [[length] for length in range(1, 9)]
    assert len(tokenizer.threads) == 1
    assert threading.current_thread().name not in tokenizer.threads
    encoder.close()


def test_prompts_wait_in_a_bounded_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_WAITING", 2)
    tokenizer: Any = SlowTokenizer()
    encoder = Prompts(tokenizer, 100)

    async def crowd() -> None:
        waiting = [asyncio.create_task(encoder.encode("x")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="too many prompts wait") as caught:
            await encoder.encode("x")
        assert caught.value.status == 503
        tokenizer.go.set()
        await asyncio.gather(*waiting)
        assert await encoder.encode("xx") == [2]

    asyncio.run(crowd())
    encoder.close()


def test_a_text_longer_than_any_tokens_could_hold_is_never_tokenized() -> None:
    tokenizer: Any = SlowTokenizer()
    tokenizer.go.set()
    encoder = Prompts(tokenizer, 100)  # 100 tokens of at most 4 characters
    assert asyncio.run(encoder.encode("x" * 400)) == [400]
    with pytest.raises(RequestError) as caught:
        asyncio.run(encoder.encode("x" * 401))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError):
        asyncio.run(encoder.encode_chat([{"role": "user", "content": "x" * 401}], {}))
    encoder.close()


def test_token_ids_that_cannot_be_decoded_are_the_requests_fault() -> None:
    tokenizer: Any = SlowTokenizer()
    encoder = Prompts(tokenizer, 100)
    with pytest.raises(RequestError, match="tokens: not token ids of this model"):
        asyncio.run(encoder.decode([2**40]))
    encoder.close()
