"""What the HTTP process and the engine process say to each other: msgspec structs as msgpack, one a zmq frame.

The engine process reads its Startup as one line of JSON from its standard input, connects to the two sockets that the
HTTP process has bound, and lives as long as that input stays open: the end of the input is the order to stop, and also
what it sees when the HTTP process is gone, however that ended.
"""

from __future__ import annotations

import msgspec

from aphroquant.engine.types import Delta, EngineConfig, EngineStats, GenerationRequest

REQUESTS_SOCKET = "requests"
EVENTS_SOCKET = "events"


class Startup(msgspec.Struct, frozen=True):
    """All that an engine process needs to start."""

    socket_directory: str
    config: EngineConfig
    log_level: str


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Start a request."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody waits for this request any more. Unknown ids are fine: it may just have finished."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is loaded and takes requests."""

    max_model_len: int
    kv_capacity_tokens: int
    backend: str
    backend_reason: str


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """The news of one engine step."""

    deltas: list[Delta]


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """A request that the engine could not take; it has no deltas."""

    request_id: str
    message: str
    status: int
    param: str | None
    code: str | None


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """The engine's figures, now and then while it works and whenever it has finished."""

    stats: EngineStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot start or go on, and ends; `exit_code` is for the command line."""

    message: str
    hint: str | None
    exit_code: int


ToEngine = Add | Abort
FromEngine = Ready | Deltas | Rejected | Stats | Fatal
