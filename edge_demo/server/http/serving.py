"""Runs the application with uvicorn until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_demo.errors import RequestError, sentence

_KEEP_ALIVE_S = 15
_HEADERS_S = 30.0  # for a client to send the lines before a body
_BACKLOG = 64
_CONNECTIONS = 256


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for clients.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        RequestError: nobody can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"cannot listen at {host}: {sentence(error)}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise RequestError(
            f"cannot listen at {host}, port {port}: {sentence(error)}; choose another --port"
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where clients find a server."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config_of(app: Starlette, drain_s: int) -> uvicorn.Config:
    """How uvicorn serves an application; arguments as of `run`."""
    return uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
        limit_concurrency=_CONNECTIONS,
        server_header=False,
        date_header=False,
        ws="none",
        http=_Connection,
    )


def run(app: Starlette, sock: socket.socket, drain_s: int, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that have begun are finished.

    Args:
        app: to serve.
        sock: that listens.
        drain_s: seconds after which unfinished answers are given up.
        on_start: called when requests can come.
    """
    # uvicorn raises the signal again at the end; a server that was asked to end has not failed.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config_of(app, drain_s), on_start).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Connection(H11Protocol):
    """A connection that is closed where a request's first lines do not come."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """As uvicorn's."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Limit the time of reading the first lines, and of nothing else."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._due is None:
            self._due = self.loop.call_later(_HEADERS_S, self.transport.close)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class _Server(uvicorn.Server):
    """Tells when requests can come."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            self._on_start()
