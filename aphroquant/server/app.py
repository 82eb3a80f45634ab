"""The routes, and how errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from aphroquant.errors import RequestError
from aphroquant.server.authentication import ApiKeys
from aphroquant.server.bodies import read_json
from aphroquant.server.chat_completions import chat_chunks, full_chat, start_chat
from aphroquant.server.completions import completion_chunks, full_completion, start_completion
from aphroquant.server.event_stream import EventStream
from aphroquant.server.generation import Service
from aphroquant.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from aphroquant.server.responses import Detokenized, ModelCard, ModelList, Tokenized, error_response
from aphroquant.server.tasks import ClientDisconnectedError, unless_disconnected

CLIENT_CLOSED_REQUEST = 499  # nobody sees it; the usual number for it in logs
RETRY_AFTER_S = 1

logger = logging.getLogger(__name__)


def create_app(service: Service, api_keys: Sequence[str]) -> FastAPI:
    """The HTTP application in front of an engine."""
    app = FastAPI(title="aphroquant", openapi_url=None, redirect_slashes=False)
    api = _Api(service)
    for path, method, handler in (
        ("/health", "GET", api.health),
        ("/metrics", "GET", api.metrics),
        ("/v1/models", "GET", api.models),
        ("/v1/models/{name:path}", "GET", api.model),
        ("/v1/chat/completions", "POST", api.chat_completions),
        ("/v1/completions", "POST", api.completions),
        ("/tokenize", "POST", api.tokenize),
        ("/detokenize", "POST", api.detokenize),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(RequestError, api.refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnectedError, _client_left)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, api.failed)
    app.add_middleware(ApiKeys, keys=api_keys)
    return app


def _body(model: type[BaseModel]) -> Any:
    async def read(request: Request) -> BaseModel:
        return await read_json(request, model)

    return Depends(read)


class _Api:
    """The routes of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._card = ModelCard(id=service.model_name, created=service.started, max_model_len=service.max_model_len)

    async def health(self) -> Response:
        failed = self._service.engine.failure is not None
        return JSONResponse({"status": "engine failed" if failed else "ok"}, status_code=503 if failed else 200)

    async def metrics(self) -> Response:
        return Response(self._service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        return _json(ModelList(data=[self._card]))

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json(self._card)

    async def chat_completions(
        self, request: Request, body: Annotated[ChatCompletionRequest, _body(ChatCompletionRequest)]
    ) -> Response:
        self._check_model(body.model)
        start = start_chat(self._service, body, _salt(request, body.cache_salt))
        generation = await unless_disconnected(request.receive, start)
        if body.stream:
            return EventStream(chat_chunks(body, generation), close=generation.aclose, failed=self._count)
        return _json(await unless_disconnected(request.receive, full_chat(body, generation)))

    async def completions(
        self, request: Request, body: Annotated[CompletionRequest, _body(CompletionRequest)]
    ) -> Response:
        self._check_model(body.model)
        start = start_completion(self._service, body, _salt(request, body.cache_salt))
        completion = await unless_disconnected(request.receive, start)
        if body.stream:
            close = completion.generation.aclose
            return EventStream(completion_chunks(completion), close=close, failed=self._count)
        return _json(await unless_disconnected(request.receive, full_completion(completion)))

    async def tokenize(self, body: Annotated[TokenizeRequest, _body(TokenizeRequest)]) -> Response:
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("either prompt or messages is required, and not both", param="prompt")
        if body.messages is not None:
            messages = [message.for_template() for message in body.messages]
            tokens = await self._service.prompts.encode_chat(messages, {})
        else:
            special = body.add_special_tokens
            tokens = await self._service.prompts.encode(body.prompt or "", add_special_tokens=special)
        return _json(Tokenized(count=len(tokens), max_model_len=self._service.max_model_len, tokens=tokens))

    async def detokenize(self, body: Annotated[DetokenizeRequest, _body(DetokenizeRequest)]) -> Response:
        self._check_model(body.model)
        return _json(Detokenized(prompt=await self._service.prompts.decode(body.tokens)))

    async def refused(self, request: Request, error: Exception) -> Response:
        """RequestError: the client's fault, or the server has no room."""
        assert isinstance(error, RequestError)
        self._count(error)
        return _error(error)

    async def failed(self, request: Request, error: Exception) -> Response:
        """Any other exception; the traceback goes to the log, and nothing of it to the client."""
        failure = RequestError("internal error", status=500)
        self._count(failure)
        return _error(failure)

    def _count(self, error: RequestError) -> None:
        self._service.metrics.request_ended("refused" if error.status < 500 else "error")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._service.model_name:
            served = self._service.model_name
            raise RequestError(
                f"the model {name[:128]!r} is not served here; {served!r} is",
                param="model",
                status=404,
                code="model_not_found",
            )


def _salt(request: Request, salt: str | None) -> str:
    """Prefixes are shared within a key's requests of the same salt, and never across keys."""
    return f"{request.state.tenant}/{salt or ''}"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _error(error: RequestError) -> Response:
    body = error_response(error.message, status=error.status, param=error.param, code=error.code)
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(body.model_dump(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path'][:128]}: {str(error.detail).lower()}"
    body = error_response(message, status=error.status_code)
    return JSONResponse(body.model_dump(), status_code=error.status_code, headers=error.headers)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
