"""Answers as server-sent events."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aphroquant.errors import RequestError
from aphroquant.server.responses import error_response
from aphroquant.server.tasks import ClientDisconnectedError, unless_disconnected

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Sends events as they come, then [DONE]; an error becomes the last event.

    However it ends, `close` is awaited; it ends at once when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[BaseModel, None],
        *,
        close: Callable[[], Awaitable[None]],
        failed: Callable[[RequestError], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with contextlib.suppress(ClientDisconnectedError):
                await unless_disconnected(receive, self._send_all(send))
        finally:
            await self._events.aclose()
            await self._close()

    async def _send_all(self, send: Send) -> None:
        try:
            async for event in self._events:
                await _send_event(send, event.model_dump_json(exclude_unset=True))
            await _send_event(send, "[DONE]")
        except RequestError as error:
            await self._send_error(send, error)
        except Exception:
            logger.exception("a stream failed")
            await self._send_error(send, RequestError("internal error", status=500))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, send: Send, error: RequestError) -> None:
        self._failed(error)
        body = error_response(error.message, status=error.status, param=error.param, code=error.code)
        await _send_event(send, body.model_dump_json())


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
