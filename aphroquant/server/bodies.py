"""Request bodies: read within limits, and parsed into request models."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from aphroquant.errors import RequestError
from aphroquant.server.validation import parse

MAX_BODY_BYTES = 32 * 2**20
BODY_TIMEOUT_S = 60.0
INLINE_BYTES = 64 * 2**10  # parsing more than this would hold up the event loop for milliseconds

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, model: type[Model]) -> Model:
    """The request model in a JSON body, or RequestError."""
    content_type = request.headers.get("content-type", "")
    # A page in a browser cannot send this type to another origin unasked.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(f"content-type must be application/json, not {content_type[:80]!r}")
    body = await _read(request)
    if len(body) <= INLINE_BYTES:
        return parse(body, model)
    return await asyncio.to_thread(parse, body, model)


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408) from None
    return bytes(body)


def _too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
