"""Builds the runtime's HTTP application: routes, request ids, error responses and limits."""

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from runtime.api.anthropic.messages import Messages
from runtime.api.health import Health
from runtime.api.http_errors import errors_as_json
from runtime.api.oip.rest import RestInference
from runtime.api.ollama.routes import Ollama
from runtime.api.openai.chat import ChatCompletions
from runtime.api.openai.completions import Completions
from runtime.api.openai.models import Models
from runtime.api.openai.tokenize import Tokenizing
from runtime.api.openai_responses.route import Responses
from runtime.api.tgi.routes import TextGeneration
from runtime.api.web_guard import add_web_guard
from runtime.config.schema import RuntimeConfig
from runtime.errors import NotSupported
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, TokenEngine
from runtime.observability.metrics import RuntimeMetrics

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = web.RequestKey("request_id", str)
_LOG = logging.getLogger(__name__)
# Routes of other servers that clients try.
_UNSUPPORTED_PATHS = (
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/moderations",
    "/v1/audio/{path:.+}",
    "/v1/images/{path:.+}",
)
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")


def build_http_app(
    directory: ModelDirectory,
    engine: TokenEngine,
    config: RuntimeConfig,
    metrics: RuntimeMetrics,
    *,
    generator: Generator | None = None,
) -> web.Application:
    """Build the application. Serve it with `http_runner`, so that a disconnect cancels the handler.

    Pass the gRPC services' `generator`, so that a model's concurrency limit counts the sequences of both.
    """
    generator = generator or Generator(engine, metrics)
    chat = ChatCompletions(directory, generator)
    completions = Completions(directory, generator)
    messages = Messages(directory, generator)
    responses = Responses(directory, generator)
    models = Models(directory)
    tokenizing = Tokenizing(directory)
    health = Health(directory, metrics)
    app = web.Application(middlewares=[_log_requests, errors_as_json], client_max_size=config.http_max_body_bytes)
    add_web_guard(app, config)
    app.on_response_prepare.append(_echo_request_id)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.post),
            web.post("/v1/completions", completions.post),
            web.post("/v1/responses", responses.post),
            web.post("/v1/messages", messages.post),
            web.post("/v1/messages/count_tokens", messages.count_tokens),
            web.get("/v1/models", models.get_all),
            web.get("/v1/models/{id:.+}", models.get_one),
            web.post("/tokenize", tokenizing.tokenize),
            web.post("/detokenize", tokenizing.detokenize),
            web.get("/health", health.health),
            web.get("/ping", health.health),
            web.get("/metrics", health.metrics),
        ]
    )
    for route in (
        *RestInference(directory, generator).routes(),
        *Ollama(directory, generator).routes(),
        *TextGeneration(directory, generator, device=config.engine.device).routes(),
    ):
        app.router.add_route(route.method, route.path, route.handler)
    app.add_routes([web.post(path, _refuse_path) for path in _UNSUPPORTED_PATHS])
    return app


def http_runner(app: web.Application, *, grace_s: float = 60.0) -> web.AppRunner:
    """Return a runner, not set up yet. It cancels a handler when its client disconnects, or `grace_s` after the cleanup began."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=grace_s)


async def _refuse_path(request: web.Request) -> web.Response:
    raise NotSupported(f"POST {request.path} is not supported yet; use /v1/chat/completions or /v1/completions")


@web.middleware
async def _log_requests(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Log one line per request when it has ended, without its text."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    request[_REQUEST_ID] = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
    start_s = time.monotonic()
    status = 499  # the client disconnected
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        level = logging.DEBUG if request.method in ("GET", "HEAD") else logging.INFO
        _LOG.log(
            level,
            "%s %s %d in %.3f s, request %s",
            request.method,
            request.path,
            status,
            time.monotonic() - start_s,
            request[_REQUEST_ID],
        )


async def _echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if _REQUEST_ID in request:  # absent if the request could not be parsed
        response.headers[REQUEST_ID_HEADER] = request[_REQUEST_ID]
