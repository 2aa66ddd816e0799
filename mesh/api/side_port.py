"""Serves a few GET paths on a port of their own, without keys and request logs: probes, the preStop hook and metrics."""

import ssl
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SHUTDOWN_S = 1.0


class SidePort:
    """`address`: `HOST:PORT` or `unix:PATH`; port 0 takes a free one. `tls`: serve HTTPS with this context."""

    def __init__(
        self, name: str, address: str, handlers: Mapping[str, Handler], tls: ssl.SSLContext | None = None
    ) -> None:
        self._name = name
        self._address = address
        self._tls = tls
        app = web.Application()
        for path, handler in handlers.items():
            app.router.add_get(path, handler)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S, access_log=None)
        self.port = 0

    async def start(self) -> None:
        """Raises OSError, naming the port's use, if the address is taken."""
        await self._runner.setup()
        if self._address.startswith("unix:"):
            site: web.BaseSite = web.UnixSite(self._runner, self._address.removeprefix("unix:"), ssl_context=self._tls)
        else:
            host, _, port = self._address.rpartition(":")
            site = web.TCPSite(self._runner, host.strip("[]") or None, int(port), ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            raise OSError(f"{self._name} address {self._address} cannot be listened on: {error.strerror}") from None
        addresses = self._runner.addresses
        self.port = addresses[0][1] if addresses and isinstance(addresses[0], tuple) else 0

    async def stop(self) -> None:
        await self._runner.cleanup()
