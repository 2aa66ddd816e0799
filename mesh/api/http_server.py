"""Serves the pod's HTTP port: forwarding of OpenAI's API, models, admin and health."""

from collections.abc import Callable, Sequence
from typing import Protocol
from urllib.parse import unquote

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from common.http_path import is_ambiguous
from common.log_headers import CALLER_HEADER
from common.web_policy import WebPolicy
from mesh.access.caller import PEER, set_caller
from mesh.access.guard import Guard
from mesh.access.peer_keys import PEER_KEY_HEADER
from mesh.access.scopes import http_scopes
from mesh.access.tls import TlsIdentity
from mesh.api.connection_limits import ConnectionLimits
from mesh.api.http_errors import errors_as_json, response_of
from mesh.api.http_listeners import HttpListeners
from mesh.api.http_request import http_secrets
from mesh.api.request_log import request_log
from mesh.api.web_guard import WebGuard
from mesh.errors import InvalidRequest, NotSupported, Unauthenticated
from mesh.observability.metrics import Metrics

# Routes of SageMaker and of text-embeddings-inference.
_UNSUPPORTED_PATHS = ("/invocations", "/embed", "/rerank")


class Routes(Protocol):
    def add_to(self, router: web.UrlDispatcher) -> None: ...


class HttpServer:
    """`address`: `HOST:PORT` or `unix:PATH`; port 0 takes a free one. `web_policy`: which browser pages may call; None on a unix socket.

    `peer_address` serves other pods if there is a `peer_tls`. `behind_envoy`: `address` is a socket that only Envoy connects to.
    """

    def __init__(
        self,
        address: str,
        routes: Sequence[Routes],
        metrics: Metrics,
        *,
        guard: Guard,
        web_policy: WebPolicy | None,
        tls: TlsIdentity | None,
        peer_address: str,
        peer_tls: TlsIdentity | None,
        limits: ConnectionLimits,
        grace_s: float,
        behind_envoy: bool = False,
    ) -> None:
        self.address = address
        self._tls = tls
        self._peer_address = peer_address
        # Its connections are those of pods. The listener for callers may ask for certificates, too.
        self._peer_context = peer_tls.server_context() if peer_tls is not None else None
        web_guard = WebGuard(web_policy, is_keyless=not guard.requires_keys, is_peer=self._is_peer)
        middlewares: list[Middleware] = [request_log(metrics), errors_as_json, web_guard.middleware]
        middlewares += [guarded(guard, self._is_peer, behind_envoy=behind_envoy), refuse_ambiguous_paths]
        self._listeners = HttpListeners(limits, middlewares, grace_s=grace_s)
        app = self._app = self._listeners.app
        web_guard.add_to(app)
        for part in routes:
            part.add_to(app.router)
        for path in _UNSUPPORTED_PATHS:
            app.router.add_post(path, _refuse_path)
        self.port = 0
        self.peer_port = 0

    def routes(self) -> list[tuple[str, str]]:
        """Return the method and the pattern of every route."""
        return [
            (route.method, route.resource.canonical)
            for route in self._app.router.routes()
            if route.resource is not None
        ]

    async def start(self) -> None:
        """Raises OSError if an address is taken."""
        context = self._tls.server_context() if self._tls is not None else None
        self.port = await self._listeners.listen(self.address, context)
        if self._peer_context is not None:
            self.peer_port = await self._listeners.listen(self._peer_address, self._peer_context)

    def _is_peer(self, request: web.Request) -> bool:
        """Return whether a request came to the listener for pods, which have authenticated by certificate."""
        context = request.transport.get_extra_info("sslcontext") if request.transport is not None else None
        return context is not None and context is self._peer_context

    async def stop(self) -> None:
        """Refuse new connections; running responses may end within the grace period."""
        await self._listeners.stop()


@web.middleware
async def refuse_ambiguous_paths(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 400 for a path that the runtime could read as another one."""
    if is_ambiguous(request.raw_path):
        raise InvalidRequest(
            "the path has a '.' or '..' segment, a backslash or a control character; send the plain path"
        )
    return await handler(request)


async def _refuse_path(request: web.Request) -> web.StreamResponse:
    raise NotSupported(f"POST {request.path} is not supported yet; there are /v1/chat/completions and /v1/completions")


def guarded(guard: Guard, is_peer: Callable[[web.Request], bool], *, behind_envoy: bool = False) -> Middleware:
    """Return a middleware that admits or refuses each request before any of its body is read.

    `is_peer`: whether a request is another pod's. `behind_envoy`: only Envoy connects, which recognises some callers itself.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_peer(request):
            set_caller(PEER)
            return await handler(request)
        resource = request.match_info.route.resource
        secrets = http_secrets(request)
        recognised = request.headers.get(CALLER_HEADER) if behind_envoy else None
        try:
            if recognised is not None:
                guard.admit_recognised(unquote(recognised))
                return await handler(request)
            end = guard.admit(
                secrets,
                request.headers.get(PEER_KEY_HEADER, ""),
                http_scopes(request.method, resource.canonical if resource is not None else None),
            )
        except Unauthenticated as error:
            response = response_of(error, request.path)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        try:
            return await handler(request)
        finally:
            if end is not None:
                end()

    return middleware
