"""The engine process: takes requests from one socket, steps the engine, and sends its news to another.

python -m aphroquant.server.engine_process, with a Startup line on standard input (see messages.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from aphroquant.engine.types import Delta, EngineConfig, EngineStats, GenerationRequest
from aphroquant.errors import AphroquantError, RequestError, is_out_of_memory
from aphroquant.server.logs import set_up_logging
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

STATS_INTERVAL_S = 0.25
FLUSH_MS = 2000  # how long the last words may take to leave the process

logger = logging.getLogger("aphroquant.server.engine_process")  # also when run as __main__


class ServedEngine(Protocol):
    """What the process needs of an engine."""

    def add_request(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Delta]: ...
    def has_unfinished(self) -> bool: ...
    def stats(self) -> EngineStats: ...


Loader = Callable[[EngineConfig], tuple[ServedEngine, Ready]]


def run(load: Loader) -> None:
    """Serve one engine until standard input ends; returns only if the engine failed, after saying so."""
    startup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Startup)
    set_up_logging(startup.log_level)
    directory = Path(startup.socket_directory)
    threading.Thread(target=_exit_with_input, args=(directory,), daemon=True).start()
    with zmq.Context() as context:
        requests = _connect(context, zmq.PULL, directory / REQUESTS_SOCKET)
        events = _connect(context, zmq.PUSH, directory / EVENTS_SOCKET)
        with requests, events:
            try:
                engine, ready = load(startup.config)
                _send(events, ready)
                _Loop(engine, requests, events).run()
            except AphroquantError as error:
                _send(events, Fatal(error.message, error.hint, error.exit_code))
            except Exception as error:
                if is_out_of_memory(error):
                    _send(events, Fatal("out of memory", "try a smaller --kv-cache-memory or --max-model-len", 5))
                    return
                logger.exception("the engine failed")
                _send(events, Fatal(f"the engine failed with {type(error).__name__}: {error}", None, 1))


def _exit_with_input(directory: Path) -> None:
    """End the process when its input does: nobody is left to serve. Also remove what a killed parent left behind."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)  # the main thread may be deep in a step


def _connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, path: Path) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)  # the number of open requests is bounded elsewhere, so neither side ever has to wait
    socket.setsockopt(zmq.LINGER, FLUSH_MS)
    socket.connect(f"ipc://{path}")
    return socket


def _send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))


class _Loop:
    """Requests in, one step, deltas out; asleep while there is nothing to do."""

    def __init__(self, engine: ServedEngine, requests: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._requests = requests
        self._events = events
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._stats_due = 0.0

    def run(self) -> None:
        while True:
            self._send_stats()
            for message in self._receive():
                self._handle(message)
            if self._engine.has_unfinished():
                deltas = self._engine.step()
                if deltas:
                    _send(self._events, Deltas(deltas))

    def _receive(self) -> Iterator[ToEngine]:
        """The messages that are waiting; waits for one if the engine is idle."""
        if not self._engine.has_unfinished():
            self._requests.poll()
        while self._requests.poll(0):
            yield self._decoder.decode(self._requests.recv())

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Abort):
            self._engine.abort(message.request_id)
        else:
            self._add(message)

    def _add(self, message: Add) -> None:
        request_id = message.request.request_id
        try:
            self._engine.add_request(message.request)
        except RequestError as error:
            self._reject(request_id, error)
        except Exception:
            # whatever is wrong with this request, those that run must not suffer for it
            logger.exception("request %s could not be added", request_id)
            self._reject(request_id, RequestError("internal error", status=500))

    def _reject(self, request_id: str, error: RequestError) -> None:
        _send(self._events, Rejected(request_id, error.message, error.status, error.param, error.code))

    def _send_stats(self) -> None:
        """Send the statistics now and then while busy, and always before falling asleep."""
        now = time.monotonic()
        if now >= self._stats_due or not self._engine.has_unfinished():
            self._stats_due = now + STATS_INTERVAL_S
            _send(self._events, Stats(self._engine.stats()))


def load_engine(config: EngineConfig) -> tuple[ServedEngine, Ready]:
    """The project's own engine."""
    # Only now: the end of standard input must be noticed while torch is still being imported.
    from aphroquant.engine.engine import Engine

    engine = Engine(config)
    kind, reason = engine.runner_choice
    return engine, Ready(engine.max_model_len, engine.kv_capacity_tokens, kind, reason)


if __name__ == "__main__":
    run(load_engine)
