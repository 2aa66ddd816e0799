"""The runtime's HTTP side put together: routes, request ids, error answers, limits."""

import re
import uuid

from aiohttp import web

from runtime.api.health import Health
from runtime.api.http_errors import errors_as_json
from runtime.api.openai_chat import ChatCompletions
from runtime.api.openai_completions import Completions
from runtime.api.openai_models import Models
from runtime.api.openai_tokenize import Tokenizing
from runtime.config import RuntimeConfig
from runtime.generation.generator import Generator
from runtime.metrics import RuntimeMetrics
from runtime.served import ModelDirectory, TokenEngine

REQUEST_ID_HEADER = "X-Request-Id"
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")


def build_http_app(
    directory: ModelDirectory,
    engine: TokenEngine,
    config: RuntimeConfig,
    metrics: RuntimeMetrics,
    *,
    generator: Generator | None = None,
) -> web.Application:
    """Serve it with `http_runner`, so that a caller who leaves cancels its handler.

    Give the gRPC services' generator too, so that a model's concurrency limit counts both.
    """
    generator = generator or Generator(engine, metrics)
    chat = ChatCompletions(directory, generator)
    completions = Completions(directory, generator)
    models = Models(directory)
    tokenizing = Tokenizing(directory)
    health = Health(directory, metrics)
    app = web.Application(middlewares=[errors_as_json], client_max_size=config.http_max_body_bytes)
    app.on_response_prepare.append(_echo_request_id)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.post),
            web.post("/v1/completions", completions.post),
            web.get("/v1/models", models.get_all),
            web.get("/v1/models/{id:.+}", models.get_one),
            web.post("/tokenize", tokenizing.tokenize),
            web.post("/detokenize", tokenizing.detokenize),
            web.get("/health", health.health),
            web.get("/ping", health.health),
            web.get("/metrics", health.metrics),
        ]
    )
    return app


def http_runner(app: web.Application) -> web.AppRunner:
    """An unset-up runner whose handlers are cancelled when their caller leaves."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None)


async def _echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """The caller's request id, or a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    response.headers[REQUEST_ID_HEADER] = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
