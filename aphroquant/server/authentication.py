"""API keys: every route but /health is closed to requests without one of them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from aphroquant.server.responses import error_response

OPEN_PATHS = frozenset({"/health"})
MESSAGE = "a valid API key is required, as 'Authorization: Bearer KEY'"


class ApiKeys:
    """ASGI middleware. Keys are kept and compared as SHA-256 digests, in a time that tells nothing about them.

    `request.state.tenant` becomes the digest of the request's key: tenants must not see from timings which prefixes
    others have in the cache. Without keys everyone may enter, as the tenant "".
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = self._tenant(scope)
            if tenant is None:
                await _refuse(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        # The scope's path is what the router will match; a URL put together from headers need not agree with it.
        if not self._digests or scope["path"] in OPEN_PATHS:
            return ""
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return digest.hex() if any(matches) and kind.lower() == "bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    body = error_response(MESSAGE, status=401, code="invalid_api_key").model_dump()
    response = JSONResponse(body, status_code=401, headers={"www-authenticate": "Bearer"})
    await response(scope, receive, send)
