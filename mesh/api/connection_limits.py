"""Closes HTTP connections that are silent, slow or too many, which the HTTP library leaves open."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds; 0 connections = no limit.

    `header_s`: from the first byte of a request, or the opening of a connection, to the end of the request's headers. `body_s`: of a body as a
    whole. `idle_s`: between requests. `write_s`: for which a client may read nothing of a response that is waiting for it.
    """

    max_connections: int
    header_s: float
    body_s: float
    idle_s: float
    write_s: float


class LimitedConnections:
    """Makes the protocols of connections, and knows from `middleware` when their requests begin and end."""

    def __init__(self, limits: ConnectionLimits, make: Callable[[], asyncio.Protocol]) -> None:
        self._limits = limits
        self._make = make
        self._open: dict[object, _Connection] = {}

    def protocol(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return _Connection(self._limits, self._make(), self._open)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = self._open.get(request.protocol)
        if connection is None:
            return await handler(request)
        connection.request_begins()
        try:
            return await handler(request)
        finally:
            connection.request_ends()


class _Connection(asyncio.Protocol):
    """Passes a connection's events to the HTTP library's protocol, and aborts the connection when a time is over."""

    def __init__(
        self, limits: ConnectionLimits, inner: asyncio.Protocol, connections: "dict[object, _Connection]"
    ) -> None:
        self._limits = limits
        self._inner = inner
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_handling = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio.Transport without deriving from it.
        transport = cast("asyncio.Transport", transport)
        limit = self._limits.max_connections
        if limit and len(self._connections) >= limit:
            logger.warning("refused a connection: %d are open, the limit of max_connections", limit)
            transport.abort()
            return
        self._transport = transport
        self._connections[self._inner] = self
        self._wait(self._limits.header_s)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        if not self._is_handling and self._timer is None:
            self._wait(self._limits.header_s)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._transport is not None else None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_write_timer()
        if self._connections.pop(self._inner, None) is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._write_timer = asyncio.get_running_loop().call_later(self._limits.write_s, self._abort)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        self._inner.resume_writing()

    def request_begins(self) -> None:
        self._is_handling = True
        self._stop_waiting()

    def request_ends(self) -> None:
        self._is_handling = False

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
