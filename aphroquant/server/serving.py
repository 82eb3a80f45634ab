"""A server's life: bind, load, announce, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import uvicorn

from aphroquant.engine.types import EngineConfig
from aphroquant.errors import RequestError, UsageError
from aphroquant.server.app import create_app
from aphroquant.server.engine_client import ENGINE_COMMAND, EngineClient
from aphroquant.server.generation import Service
from aphroquant.server.metrics import Metrics
from aphroquant.server.prompts import Prompts
from aphroquant.server.settings import ServerSettings
from aphroquant.server.tasks import running

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAIN_S = 5  # how long answers may take to complete once the server was told to stop
CRASH_LINGER_S = 1.0  # how long /health tells of a dead engine before the server ends
MAX_HEADER_BYTES = 64 * 2**10
SIGNALS = (signal.SIGINT, signal.SIGTERM)

TokenizerLoader = Callable[[str], "PreTrainedTokenizerBase"]

logger = logging.getLogger(__name__)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint."""
    from aphroquant.checkpoint import open_checkpoint  # brings torch: only when a server really starts

    return open_checkpoint(model).tokenizer()


def serve(
    config: EngineConfig,
    settings: ServerSettings,
    announce: Callable[[str], None],
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    tokenizer_loader: TokenizerLoader = load_tokenizer,
) -> None:
    """Serve until SIGINT or SIGTERM.

    `announce` gets one line when the server is ready. Raises UsageError if the port is taken, the engine's error if it
    cannot start or ends, and KeyboardInterrupt if a signal comes before the model is loaded.
    """
    with _bound_socket(settings.host, settings.port) as listener:
        if not settings.api_keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            logger.warning("other machines can reach this server, and it has no API key")
        client = EngineClient(config, command=engine_command, max_open=settings.max_open, log_level=settings.log_level)
        try:
            asyncio.run(_serve(client, config.model, settings, announce, listener, tokenizer_loader))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _serve(
    client: EngineClient,
    model: str,
    settings: ServerSettings,
    announce: Callable[[str], None],
    listener: socket.socket,
    tokenizer_loader: TokenizerLoader,
) -> None:
    main = asyncio.current_task()
    assert main is not None
    _on_signals(main.cancel)  # until the model is loaded there is nothing to drain
    async with running(asyncio.to_thread(tokenizer_loader, model)) as tokenizer, client as engine:
        service = Service(
            engine=engine,
            prompts=Prompts(await tokenizer, engine.ready.max_model_len),
            metrics=Metrics(lambda: engine.stats),
            model_name=settings.model_name(model),
            started=int(time.time()),
        )
        server = _Server(service, settings, lambda: announce(_ready_line(service, listener)))
        _on_signals(server.stop)
        engine.on_failure = server.stop_after_crash
        with contextlib.closing(service.prompts):
            await server.serve([listener])
        if engine.failure is not None:
            raise engine.failure


class _Server(uvicorn.Server):
    """uvicorn with this project's way of starting and stopping."""

    def __init__(self, service: Service, settings: ServerSettings, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(service, settings.api_keys),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=2 * DRAIN_S,
        )
        super().__init__(config)
        self._engine = service.engine
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to _on_signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was bound to the port, and began to listen in the meantime
            raise UsageError(f"cannot listen: {error.strerror}", hint=PORT_HINT) from error
        self._announce()

    def stop(self) -> None:
        """Take no new requests and let the open ones finish for a while; a second call ends them at once."""
        if self.should_exit:
            self._end_streams()
            return
        self.should_exit = True
        asyncio.get_running_loop().call_later(DRAIN_S, self._end_streams)

    def stop_after_crash(self) -> None:
        """The engine is gone, and all open requests have failed."""
        logger.error("the engine has stopped; the server ends")
        asyncio.get_running_loop().call_later(CRASH_LINGER_S, self._exit)

    def _exit(self) -> None:
        self.should_exit = True

    def _end_streams(self) -> None:
        self._engine.end_streams(RequestError("the server is shutting down", status=503, code="shutting_down"))


PORT_HINT = "choose another --port; --port 0 takes any free one"


@contextlib.contextmanager
def _bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before the model is loaded, so that a taken port is found at once."""
    with contextlib.ExitStack() as exits:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # of several addresses of a name, such as localhost, the one that every client tries
            family, kind, protocol, _, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
            listener = exits.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}", hint=PORT_HINT) from error
        yield listener


def _on_signals(action: Callable[[], object]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, action)


def _ready_line(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    ready = service.engine.ready
    host = f"[{host}]" if ":" in host else host
    return (
        f"ready: http://{host}:{port} serves {service.model_name}"
        f" (KV cache {ready.kv_capacity_tokens} tokens, backend {ready.backend}: {ready.backend_reason})"
    )
