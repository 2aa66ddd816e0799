"""Builds the runtime's HTTP application: routes, request ids, error responses and limits."""

from aiohttp import web

from runtime.api.http_errors import errors_as_json
from runtime.api.http_routes import http_routes
from runtime.api.request_log import add_headers, request_log
from runtime.api.web_guard import add_web_guard
from runtime.config.schema import RuntimeConfig
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, TokenEngine
from runtime.observability.metrics import RuntimeMetrics


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
    app = web.Application(middlewares=[request_log, errors_as_json], client_max_size=config.http_max_body_bytes)
    add_web_guard(app, config)
    app.on_response_prepare.append(add_headers)
    for route in http_routes(directory, generator, config, metrics):
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)
    return app


def http_runner(app: web.Application, *, grace_s: float = 60.0) -> web.AppRunner:
    """Return a runner, not set up yet. It cancels a handler when its client disconnects, or `grace_s` after the cleanup began."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=grace_s)
