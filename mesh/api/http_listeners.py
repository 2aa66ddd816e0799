"""Runs an aiohttp application on the addresses of one process, with limits on its connections."""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from mesh.api.connection_limits import ConnectionLimits, LimitedConnections
from mesh.api.http_body import BODY_TIMEOUT_S

_HEADERS_BYTES = 16 * 1024
_BACKLOG = 1024
_HANDSHAKE_S = 20.0


class HttpListeners:
    """`app` has these middlewares, outermost first, and no routes yet. `grace_s`: the time that running responses have at the end."""

    def __init__(self, limits: ConnectionLimits, middlewares: Sequence[Middleware], *, grace_s: float) -> None:
        self._connections = LimitedConnections(limits, self._library_protocol)
        self.app = web.Application(middlewares=[self._connections.middleware, *middlewares])
        self.app[BODY_TIMEOUT_S] = limits.body_s
        # A client that disconnects must free its sequence.
        self._runner = web.AppRunner(
            self.app,
            handler_cancellation=True,
            keepalive_timeout=limits.idle_s,
            shutdown_timeout=grace_s,
            access_log=None,
            # Bodies are decoded after the key was checked, off the event loop.
            auto_decompress=False,
            max_field_size=_HEADERS_BYTES,
            max_line_size=_HEADERS_BYTES,
        )
        self._listeners: list[asyncio.Server] = []

    async def listen(self, address: str, tls: ssl.SSLContext | None, *, is_shared: bool = False) -> int:
        """Listen at an address and return the port, 0 for a unix socket. `is_shared`: other processes listen at the port, too.

        Raises OSError if the address is taken.
        """
        if self._runner.server is None:
            await self._runner.setup()
        options: dict[str, Any] = {"backlog": _BACKLOG}
        if tls is not None:
            options |= {"ssl": tls, "ssl_handshake_timeout": _HANDSHAKE_S}
        loop, make = asyncio.get_running_loop(), self._connections.protocol
        if address.startswith("unix:"):
            self._listeners.append(await loop.create_unix_server(make, address.removeprefix("unix:"), **options))
            return 0
        host, _, port = address.rpartition(":")
        listener = await loop.create_server(
            make, host.strip("[]") or None, int(port), reuse_port=is_shared or None, **options
        )
        self._listeners.append(listener)
        return int(listener.sockets[0].getsockname()[1])

    def _library_protocol(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        return server()

    async def stop(self) -> None:
        """Refuse new connections; running responses may end within the grace period."""
        for listener in self._listeners:
            listener.close()
        await self._runner.cleanup()
