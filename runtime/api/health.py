"""GET /health, /ping and /metrics."""

from aiohttp import web

from runtime.interfaces import ModelDirectory
from runtime.observability.metrics import RuntimeMetrics


class Health:
    def __init__(self, directory: ModelDirectory, metrics: RuntimeMetrics) -> None:
        self._directory = directory
        self._metrics = metrics

    async def health(self, request: web.Request) -> web.Response:
        """200 while requests can be taken, with no model loaded too; 503 while the engine restarts or the runtime stops."""
        self._directory.list()  # raises Unavailable, which is answered with 503
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
