"""The HTTP process's end of the engine: starts the engine process, streams its deltas, and notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from aphroquant.engine.types import Delta, EngineConfig, EngineStats, GenerationRequest
from aphroquant.errors import AphroquantError, RequestError, ResourceError
from aphroquant.server.messages import (
    EVENTS_SOCKET,
    REQUESTS_SOCKET,
    Abort,
    Add,
    Deltas,
    Fatal,
    FromEngine,
    Ready,
    Rejected,
    Startup,
    Stats,
    ToEngine,
)
from aphroquant.server.tasks import running

ENGINE_COMMAND = (sys.executable, "-m", "aphroquant.server.engine_process")
LAST_WORDS_S = 0.5  # between the end of the process and reading what it said before
STOP_S = 10.0
MAX_DIRECTORY_LEN = 90  # a socket's whole path has 107 bytes

AnySocket = TypeVar("AnySocket", bound="zmq.Socket[Any]")

logger = logging.getLogger(__name__)


class EngineError(AphroquantError):
    """The engine process could not start, or ended; with the exit code of the reason."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class EngineClient:
    """One engine process. Use as an async context manager: entering starts the process and waits until it is ready.

    `failure` is set once the process has ended by itself; `on_failure` is called at that moment. At most `max_open`
    choices are open at a time; more are refused with a 503.
    """

    ready: Ready

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        max_open: int = 1024,
        log_level: str = "warning",
    ) -> None:
        self.stats = EngineStats()
        self.failure: AphroquantError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._config = config
        self._command = command
        self._log_level = log_level
        self._max_open = max_open
        self._num_open = 0
        self._queues: dict[str, asyncio.Queue[Delta | RequestError]] = {}
        self._exits = contextlib.AsyncExitStack()
        self._closed_to: RequestError | None = None
        self._is_ready = asyncio.Event()

    async def __aenter__(self) -> EngineClient:
        async with contextlib.AsyncExitStack() as exits:
            await self._start(exits)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def stream(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices of `requests`, as they come.

        Closing the generator early, or cancelling it, aborts in the engine what is unfinished.
        """
        num_choices = sum(request.sampling.n for request in requests)
        self._check_room(num_choices)
        queue: asyncio.Queue[Delta | RequestError] = asyncio.Queue()
        unfinished = {request.request_id: request.sampling.n for request in requests}
        self._num_open += num_choices
        try:
            for request in requests:
                self._queues[request.request_id] = queue
                self._send(Add(request))
            while unfinished:
                event = await queue.get()
                if isinstance(event, RequestError):
                    raise event
                if event.finish_reason is not None:
                    unfinished[event.request_id] -= 1
                    if not unfinished[event.request_id]:
                        del unfinished[event.request_id]
                yield event
        finally:
            self._num_open -= num_choices
            for request in requests:
                self._queues.pop(request.request_id, None)
            for request_id in unfinished:
                self._send(Abort(request_id))

    def end_streams(self, error: RequestError) -> None:
        """End all open streams with an error, and refuse new ones with it."""
        self._closed_to = error
        for queue in set(self._queues.values()):
            queue.put_nowait(error)

    def _check_room(self, num_choices: int) -> None:
        if self._closed_to is not None:
            raise self._closed_to
        if num_choices > self._max_open:
            raise RequestError(
                f"{num_choices} choices (prompts x n) are more than the {self._max_open} that may be open here",
                param="n",
            )
        if self._num_open + num_choices > self._max_open:
            raise RequestError(
                f"the server is busy: {self._num_open} of at most {self._max_open} choices are open; try again later",
                status=503,
                code="queue_full",
            )

    async def _start(self, exits: contextlib.AsyncExitStack) -> None:
        directory = exits.enter_context(_private_directory())
        context = exits.enter_context(zmq.asyncio.Context())
        # The requests go through a plain socket: sending never waits (no high-water mark), so that an abort can be
        # sent from a task that is being cancelled.
        plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context)
        self._requests = exits.enter_context(_bind(plain, zmq.PUSH, directory / REQUESTS_SOCKET))
        self._events = exits.enter_context(_bind(context, zmq.PULL, directory / EVENTS_SOCKET))
        process = await _spawn(self._command)
        exits.push_async_callback(_stop, process)
        startup = Startup(str(directory), self._config, self._log_level)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(startup) + b"\n")
        followed = await exits.enter_async_context(running(self._follow(process)))
        async with running(self._is_ready.wait()) as is_ready:
            await asyncio.wait({is_ready, followed}, return_when=asyncio.FIRST_COMPLETED)
        if self.failure is not None:
            raise self.failure

    def _send(self, message: ToEngine) -> None:
        try:
            self._requests.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the engine is gone, and _watch is about to tell everyone
            logger.debug("no engine to send %s to", type(message).__name__)

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Pass on the events until the process ends, which is never wanted while this runs."""
        async with running(self._receive()) as receiver, running(process.wait()) as ended:
            await asyncio.wait({receiver, ended}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({receiver}, timeout=LAST_WORDS_S)
            if receiver.done():
                self.failure = receiver.result()
            else:
                self.failure = _failure_of_exit(await ended, started=self._is_ready.is_set())
        self.end_streams(RequestError("the engine has stopped", status=500, code="engine_stopped"))
        self._closed_to = RequestError("the engine has stopped", status=503, code="engine_stopped")
        self.on_failure()

    async def _receive(self) -> EngineError:
        """Pass on events; ends with the process's last words."""
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            try:
                message = decoder.decode(await self._events.recv())
            except msgspec.DecodeError as error:
                return EngineError(f"the engine process sent an unreadable message: {error}")
            if isinstance(message, Fatal):
                return EngineError(message.message, hint=message.hint, exit_code=message.exit_code)
            self._dispatch(message)

    def _dispatch(self, message: Ready | Deltas | Rejected | Stats) -> None:
        match message:
            case Deltas():
                for delta in message.deltas:
                    self._put(delta.request_id, delta)
            case Rejected():
                error = RequestError(message.message, param=message.param, status=message.status, code=message.code)
                self._put(message.request_id, error)
            case Stats():
                self.stats = message.stats
            case Ready():
                self.ready = message
                self._is_ready.set()

    def _put(self, request_id: str, event: Delta | RequestError) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:  # else it was aborted while this was on its way
            queue.put_nowait(event)


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory that only this user can enter, removed at the end."""
    with contextlib.ExitStack() as exits:
        directory = exits.enter_context(tempfile.TemporaryDirectory(prefix="aphroquant-", ignore_cleanup_errors=True))
        if len(directory) > MAX_DIRECTORY_LEN:  # a deep TMPDIR
            directory = exits.enter_context(
                tempfile.TemporaryDirectory(prefix="aphroquant-", dir="/tmp", ignore_cleanup_errors=True)
            )
        yield Path(directory)


def _bind(context: zmq.Context[AnySocket], kind: int, path: Path) -> AnySocket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{path}")
    return socket


async def _spawn(command: Sequence[str]) -> asyncio.subprocess.Process:
    """Start the engine process, in a session of its own: a Ctrl-C in the terminal is this process's to handle."""
    return await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=sys.__stderr__, start_new_session=True
    )


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the process: its standard input closes, and it goes (see messages.py)."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        logger.warning("the engine process did not stop within %g s and is killed", STOP_S)
        process.kill()
        await process.wait()


def _failure_of_exit(code: int, *, started: bool) -> AphroquantError:
    """What the end of a process that said nothing means."""
    when = "while serving" if started else "while loading the model"
    if code == -signal.SIGKILL:
        hint = "most likely the machine ran out of memory; try a smaller --kv-cache-memory or --max-model-len"
        return ResourceError(f"the engine process was killed {when}", hint=hint)
    reason = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return EngineError(f"the engine process ended {when}, {reason}")
