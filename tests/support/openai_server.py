"""A real HTTP server over a scripted engine, for the tests of OpenAI's routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from runtime.api.http_app import build_http_app, http_runner
from runtime.config.schema import RuntimeConfig
from runtime.interfaces import ServedModel
from runtime.observability.metrics import RuntimeMetrics
from tests.support.scripted_engine import Directory, ScriptedEngine


@dataclass(frozen=True)
class Server:
    url: str
    engine: ScriptedEngine
    model: ServedModel
    metrics: RuntimeMetrics

    def script(self, text: str) -> list[int]:
        return self.model.text.encode(text, add_special_tokens=False)


@asynccontextmanager
async def serve(
    engine: ScriptedEngine, *models: ServedModel, config: RuntimeConfig | None = None
) -> AsyncIterator[Server]:
    metrics = RuntimeMetrics()
    runner = http_runner(build_http_app(Directory(list(models)), engine, config or RuntimeConfig(), metrics))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield Server(f"http://127.0.0.1:{port}", engine, models[0], metrics)
    finally:
        await runner.cleanup()
