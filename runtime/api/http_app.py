"""Builds the runtime's HTTP application: routes, request ids, error responses and limits."""

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
from runtime.api.request_log import add_headers, request_log
from runtime.api.tgi.routes import TextGeneration
from runtime.api.web_guard import add_web_guard
from runtime.config.schema import RuntimeConfig
from runtime.errors import NotSupported
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, TokenEngine
from runtime.observability.metrics import RuntimeMetrics

# Routes of other servers that clients try.
_UNSUPPORTED_PATHS = (
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/moderations",
    "/v1/audio/{path:.+}",
    "/v1/images/{path:.+}",
)


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
    app = web.Application(middlewares=[request_log, errors_as_json], client_max_size=config.http_max_body_bytes)
    add_web_guard(app, config)
    app.on_response_prepare.append(add_headers)
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
