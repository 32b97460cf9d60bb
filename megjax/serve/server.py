"""Runs a server: listens, and ends without losing what it accepted."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megjax.errors import MegError
from megjax.pipeline import Pipeline
from megjax.serve.app import create_app
from megjax.serve.config import ServeConfig
from megjax.serve.service import Service

LAST_WORDS_S = 1.0

log = logging.getLogger("megjax.serve")


def run(pipeline: Pipeline, config: ServeConfig, listener: socket.socket) -> bool:
    """Serve until SIGTERM or SIGINT; a second one ends it at once. Returns whether it ended as told.

    On the first signal what waits is finished, new requests are answered 503, and only then does it close.

    Args:
        pipeline: what generates.
        config: how.
        listener: from `listen`.

    Raises:
        MegError: see `Service`.
    """
    service = Service(pipeline, config)
    failed = False

    def fail() -> None:
        nonlocal failed
        failed = server.should_exit = True

    app = create_app(service, fail)
    settings = uvicorn.Config(
        app,
        http=_prompt(config.receive_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=config.connections,
        timeout_keep_alive=int(max(1, config.receive_s)),
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=16384,
        proxy_headers=False,
    )
    server = uvicorn.Server(settings)
    at_once = server.handle_exit
    stopping: list[asyncio.Task[None]] = []

    def stop(sig: int, frame: FrameType | None) -> None:
        if stopping:
            return at_once(sig, frame)
        log.info("%s: finishing what was accepted", signal.Signals(sig).name)
        loop = asyncio.get_event_loop()
        loop.call_soon_threadsafe(lambda: stopping.append(loop.create_task(drain())))

    async def drain() -> None:
        await service.batcher.drain(config.drain_s)
        # Who was answered last may ask again at once, and is to get its 503 rather than a reset connection.
        await asyncio.sleep(LAST_WORDS_S)
        server.should_exit = True

    server.handle_exit = stop
    host, port = listener.getsockname()[:2]
    log.info("http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    return not failed


def _prompt(receive_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, but a request's head must be there in time: uvicorn itself waits for ever."""

    class Prompt(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self._stop()
            elif self.late is None:
                self.late = self.loop.call_later(receive_s, self.transport.close)

        def _stop(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Prompt


def listen(config: ServeConfig) -> socket.socket:
    """Take the address.

    Raises:
        MegError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        raise MegError(f"cannot listen on {config.host} port {config.port}: {error}") from None
