"""A real HTTP server over a scripted engine, for the tests of OpenAI's routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from runtime.api.http_app import build_http_app, http_runner
from runtime.config.schema import RuntimeConfig
from runtime.interfaces import ServedModel
from runtime.observability.metrics import RuntimeMetrics
from tests.support.scripted_engine import Directory, ScriptedEngine

TEXT = "The dog sleeps."  # what the shared server's engine answers


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


async def post(
    http: aiohttp.ClientSession, server: Server, path: str, body: Any, **headers: str
) -> tuple[int, Any, Any]:
    """Return the status, the decoded body and the headers of a response."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    async with http.post(server.url + path, data=data, headers=headers) as response:
        raw = await response.read()
        return response.status, msgspec.json.decode(raw), response.headers


async def events(http: aiohttp.ClientSession, server: Server, path: str, body: Any) -> list[Any]:
    """Return the decoded events of a stream that ends with [DONE]."""
    async with http.post(server.url + path, json=body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        text = await response.text()
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [msgspec.json.decode(block.removeprefix("data: ")) for block in blocks[:-2]]


def chat(**fields: Any) -> dict[str, Any]:
    """Return the body of a chat request to `m1`."""
    return {"model": "m1", "messages": [{"role": "user", "content": "hi"}], **fields}
