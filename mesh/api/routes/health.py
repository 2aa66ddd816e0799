"""Serves liveness and readiness probes, which need no key, and Prometheus metrics."""

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import msgspec
from aiohttp import web

from mesh.client.connections import Connections
from mesh.client.peer_probes import Readiness

logger = logging.getLogger(__name__)

_RUNTIME_S = 2.0


class HealthRoutes:
    """`figures` returns this pod's own metrics. Those of the runtime at `runtime_http` are appended; empty if it has no HTTP port."""

    def __init__(
        self,
        connections: Connections,
        runtime_http: str,
        readiness: Callable[[], Readiness],
        figures: Callable[[], bytes],
    ) -> None:
        self._connections = connections
        self._runtime_http = runtime_http
        self._readiness = readiness
        self._figures = figures

    def add_to(self, router: web.UrlDispatcher) -> None:
        for path in ("/health", "/healthz"):
            router.add_get(path, self.alive)
        router.add_get("/readyz", self.ready)
        router.add_get("/metrics", self.metrics)

    async def alive(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        """Answer 200 if the pod is ready, else 503. The body also says how long the store has not answered."""
        readiness = self._readiness()
        status = 200 if readiness.status == "ready" else 503
        return web.json_response(body=msgspec.json.encode(readiness), status=status)

    async def metrics(self, request: web.Request) -> web.Response:
        text = self._figures()
        if request.method == "GET":
            text += await self._runtime_figures()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _runtime_figures(self) -> bytes:
        """Return the runtime's metrics; empty if it does not answer, so that the pod's own are still served."""
        if not self._runtime_http:
            return b""
        session, base = self._connections.http(self._runtime_http)
        try:
            async with asyncio.timeout(_RUNTIME_S), session.get(f"{base}/metrics") as answer:
                return await answer.read() if answer.status == 200 else b""
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.debug("no metrics from the runtime: %s", error)
            return b""
