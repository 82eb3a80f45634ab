"""The two ends of the engine process, without HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aphroquant.engine.types import Delta, EngineConfig, GenerationRequest, SamplingParams
from aphroquant.errors import AphroquantError, RequestError
from aphroquant.server import engine_client
from aphroquant.server.engine_client import EngineClient

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets go; each test leaves it empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[EngineClient]:
    async with EngineClient(EngineConfig(model="fake"), command=COMMAND, **settings) as client:
        yield client


def request(prompt: str, request_id: str = "one", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=list(prompt.encode()), sampling=SamplingParams(**sampling)
    )


async def texts(client: EngineClient, *requests: GenerationRequest) -> dict[tuple[str, int], str]:
    answers: dict[tuple[str, int], str] = {}
    async for delta in client.stream(requests):
        key = (delta.request_id, delta.index)
        answers[key] = answers.get(key, "") + delta.text
    return answers


@pytest.mark.parametrize(
    ("start", "code", "message"),
    [
        ("usage", 2, "max_model_len = 9 is too much"),
        ("missing", 3, "nowhere: no such checkpoint"),
        ("memory", 5, "out of memory"),
        ("bug", 1, "the engine failed with KeyError: 'model.layers.0'"),
        ("exit", 1, "the engine process ended while loading the model, with exit code 7"),
        ("kill", 5, "the engine process was killed while loading the model"),
    ],
)
def test_a_process_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, start: str, code: int, message: str
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", json.dumps({"start": start}))

    async def enter() -> None:
        async with engine():
            raise AssertionError("it started")

    with pytest.raises(AphroquantError) as caught:
        asyncio.run(enter())
    assert (caught.value.message, caught.value.exit_code) == (message, code)
    assert not list(temporary.iterdir())


def test_a_command_that_does_not_exist_is_not_waited_for() -> None:
    async def enter() -> None:
        async with EngineClient(EngineConfig(model="fake"), command=("/no/such/program",)):
            raise AssertionError("it started")

    with pytest.raises(FileNotFoundError):
        asyncio.run(enter())


def test_requests_share_a_stream_and_keep_their_texts_apart(temporary: Path) -> None:
    async def ask() -> dict[tuple[str, int], str]:
        async with engine() as client:
            return await texts(client, request("ab", "one", n=2, max_tokens=3), request("cd", "two", max_tokens=1))

    answers = asyncio.run(ask())
    assert set(answers) == {("one", 0), ("one", 1), ("two", 0)}
    assert len(set(answers.values())) == 3
    assert [text.count(" ") for text in answers.values()] == [3, 3, 1]
    assert not list(temporary.iterdir())


def test_closing_a_stream_aborts_it_in_the_engine() -> None:
    async def leave() -> None:
        async with engine() as client:
            async with aclosing(client.stream([request("SLOW", max_tokens=1000)])) as stream:
                await anext(stream)
                while not client.stats.num_running:
                    await asyncio.sleep(0.01)
            while client.stats.num_running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 20))


def test_a_cancelled_reader_aborts_in_the_engine() -> None:
    async def leave() -> None:
        async with engine() as client:
            reader = asyncio.create_task(texts(client, request("STALL")))
            while not client.stats.num_running:
                await asyncio.sleep(0.01)
            reader.cancel()
            while client.stats.num_running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 20))


def test_more_choices_than_there_is_room_for_are_refused() -> None:
    async def fill() -> None:
        async with engine(max_open=3) as client:
            async with aclosing(client.stream([request("SLOW", n=2, max_tokens=1000)])) as stream:
                await anext(stream)
                with pytest.raises(RequestError, match="2 of at most 3 choices are open") as caught:
                    await texts(client, request("ab", "two", n=2))
                assert caught.value.status == 503
            assert await texts(client, request("ab", "three", n=3))
            with pytest.raises(RequestError, match=r"4 choices .* are more than the 3") as caught:
                await texts(client, request("ab", "four", n=4))
            assert caught.value.status == 400  # trying again would not help

    asyncio.run(fill())


def test_what_the_engine_refuses_is_raised() -> None:
    async def ask() -> None:
        async with engine() as client:
            with pytest.raises(RequestError, match="can never fit") as caught:
                await texts(client, request("REJECT"))
            assert (caught.value.status, caught.value.param) == (400, "prompt")
            with pytest.raises(RequestError, match="internal error") as caught:
                await texts(client, request("BROKEN"))
            assert caught.value.status == 500

    asyncio.run(ask())


def test_a_crash_fails_the_open_streams_and_all_later_ones() -> None:
    async def crash() -> None:
        async with engine() as client:
            failed = asyncio.Event()
            client.on_failure = failed.set
            with pytest.raises(RequestError, match="the engine has stopped") as caught:
                await texts(client, request("CRASH"))
            assert caught.value.status == 500
            await failed.wait()
            assert client.failure is not None
            assert client.failure.message == "the engine failed with RuntimeError: the fake engine crashed"
            with pytest.raises(RequestError) as caught:
                await texts(client, request("ab"))
            assert caught.value.status == 503

    asyncio.run(crash())


def test_deltas_of_forgotten_requests_are_dropped() -> None:
    client = EngineClient(EngineConfig(model="fake"))
    client._put("forgotten", Delta(request_id="forgotten"))
    assert client._queues == {}


def test_a_deep_temporary_directory_does_not_break_the_sockets(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = temporary / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with engine_client._private_directory() as directory:
        assert directory.parent == Path("/tmp")
    assert not directory.exists()
    assert not list(deep.iterdir())
