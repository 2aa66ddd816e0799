"""Serves GET /openapi.json: the routes of this port, each with the runtime's own description of it where the request is forwarded to it."""

import asyncio
import inspect
import logging
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from common.version import package_version
from mesh.client.connections import Connections

logger = logging.getLogger(__name__)

_RUNTIME_S = 2.0
_METHODS = ("GET", "POST", "PUT", "DELETE")
_WITH_BODY = ("POST", "PUT")


class OpenApiRoute:
    """`runtime_http`: the address of the local runtime; empty if it has no HTTP port."""

    def __init__(self, connections: Connections, runtime_http: str) -> None:
        self._connections = connections
        self._runtime_http = runtime_http

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/openapi.json", self._get)

    async def _get(self, request: web.Request) -> web.Response:
        """Describe the HTTP API in OpenAPI 3.1."""
        of_runtime = await self._runtime_document()
        described = of_runtime.get("paths", {})
        paths: dict[str, dict[str, Any]] = {}
        for route in request.app.router.routes():
            if route.resource is None or route.method not in _METHODS:
                continue
            path, verb = route.resource.canonical, route.method.lower()
            known = described.get(path, {}).get(verb)
            paths.setdefault(path, {})[verb] = known or _operation(path, route.method, route.handler)
        document = {
            "openapi": "3.1.0",
            "info": {"title": "Repertory", "version": package_version()},
            "paths": dict(sorted(paths.items())),
            "components": of_runtime.get("components", {}),
        }
        return web.Response(body=msgspec.json.encode(document), content_type="application/json")

    async def _runtime_document(self) -> dict[str, Any]:
        """Return the runtime's own description; empty if it has none, as a foreign runtime may."""
        if not self._runtime_http:
            return {}
        session, base = self._connections.http(self._runtime_http)
        try:
            async with asyncio.timeout(_RUNTIME_S), session.get(f"{base}/openapi.json") as answer:
                if answer.status != 200:
                    return {}
                return msgspec.json.decode(await answer.read(), type=dict[str, Any])
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            logger.debug("no API description from the runtime: %s", error)
            return {}


def _operation(path: str, method: str, handler: Handler) -> dict[str, Any]:
    """Describe a route that this process answers itself, with the first line of its handler's docstring."""
    about = inspect.getdoc(handler) or ""
    names = [part.partition("}")[0] for part in path.split("{")[1:]]
    operation: dict[str, Any] = {
        "summary": about.partition("\n")[0] or f"{method} {path}",
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names],
        "responses": {
            "2XX": {"description": "The answer"},
            "4XX": {"description": "The request is refused"},
            "5XX": {"description": "The request failed"},
        },
    }
    if method in _WITH_BODY:
        operation["requestBody"] = {"content": {"application/json": {"schema": {}}}}
    return operation
