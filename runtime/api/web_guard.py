"""Applies the rules of Host, Origin and CORS to the runtime's HTTP port, which needs no key."""

import socket

from aiohttp import web
from aiohttp.typedefs import Handler

from common.addresses import parse_address
from common.web_policy import WebPolicy
from runtime.config.schema import RuntimeConfig
from runtime.errors import PermissionDenied

_OPEN = ("/health", "/ping", "/metrics")  # for probes and scrapers, which come under any name


def add_web_guard(app: web.Application, config: RuntimeConfig) -> None:
    """Add the rules to an application. A unix socket needs none, because no browser reaches it."""
    address = parse_address(config.http_listen)
    if address.path:
        return
    policy = WebPolicy.of_listener(address.host, (*config.allowed_hosts, socket.gethostname()), config.cors_origins)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if preflight := policy.preflight_headers(request.method, request.headers):
            return web.Response(status=204, headers=preflight)
        if request.path not in _OPEN and (refusal := policy.refusal(request.method, request.headers)):
            raise PermissionDenied(refusal)
        return await handler(request)

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        for name, value in policy.response_headers(request.headers.get("Origin")).items():
            response.headers.setdefault(name, value)

    app.middlewares.append(guard)
    app.on_response_prepare.append(add_headers)
