"""Serves the pod's HTTP port: forwarding of OpenAI's API, models, admin and health."""

from collections.abc import Sequence
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from common.http_path import is_ambiguous
from common.web_policy import WebPolicy
from mesh.access.caller import PEER, set_caller
from mesh.access.peer_keys import PEER_KEY_HEADER, PeerKeys
from mesh.api.grpc_server import key_is_known
from mesh.api.http_errors import errors_as_json, response_of
from mesh.api.request_log import request_log
from mesh.api.web_guard import WebGuard
from mesh.errors import InvalidRequest, NotSupported, Unauthenticated
from mesh.metrics import Metrics

_OPEN_TO_ALL = ("/health", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_HEADERS_BYTES = 16 * 1024
# Routes of SageMaker and of text-embeddings-inference.
_UNSUPPORTED_PATHS = ("/invocations", "/embed", "/rerank")


class Routes(Protocol):
    def add_to(self, router: web.UrlDispatcher) -> None: ...


class HttpServer:
    """`address`: `HOST:PORT` or `unix:PATH`; port 0 takes a free one. `web_policy`: which browser pages may call; None on a unix socket."""

    def __init__(
        self,
        address: str,
        routes: Sequence[Routes],
        metrics: Metrics,
        *,
        keys: tuple[str, ...],
        peers: PeerKeys,
        web_policy: WebPolicy | None,
        grace_s: float,
    ) -> None:
        self._address = address
        web_guard = WebGuard(web_policy, is_keyless=not keys)
        middlewares: list[Middleware] = [request_log(metrics), errors_as_json, web_guard.middleware]
        middlewares += [key_guard(keys, peers), refuse_ambiguous_paths]
        app = web.Application(middlewares=middlewares)
        web_guard.add_to(app)
        for part in routes:
            part.add_to(app.router)
        for path in _UNSUPPORTED_PATHS:
            app.router.add_post(path, _refuse_path)
        # A client that disconnects must free its sequence.
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=grace_s,
            access_log=None,
            # Bodies are decoded after the key was checked, off the event loop.
            auto_decompress=False,
            max_field_size=_HEADERS_BYTES,
            max_line_size=_HEADERS_BYTES,
        )
        self._sites: list[web.BaseSite] = []
        self.port = 0

    async def start(self) -> None:
        """Raises OSError if the address is taken."""
        await self._runner.setup()
        if self._address.startswith("unix:"):
            site: web.BaseSite = web.UnixSite(self._runner, self._address.removeprefix("unix:"))
        else:
            host, _, port = self._address.rpartition(":")
            site = web.TCPSite(self._runner, host.strip("[]") or None, int(port), backlog=1024, reuse_port=False)
        await site.start()
        self._sites.append(site)
        addresses = self._runner.addresses
        self.port = addresses[0][1] if addresses and isinstance(addresses[0], tuple) else 0

    async def stop(self) -> None:
        """Refuse new connections; running responses may end within the grace period."""
        await self._runner.cleanup()


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


def key_guard(keys: tuple[str, ...], peers: PeerKeys) -> Middleware:
    """Return a middleware that recognises peers and requires one of the keys, if there are keys, except for health probes.

    Clients send it as a bearer key, or in `x-api-key` as Anthropic's do.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        sent = (request.headers.get("Authorization", ""), f"Bearer {request.headers.get('x-api-key', '')}")
        if peers.recognises(request.headers.get(PEER_KEY_HEADER, "")):
            set_caller(PEER)
            return await handler(request)
        if not keys or request.path in _OPEN_TO_ALL or any(key_is_known(value, keys) for value in sent):
            return await handler(request)
        response = response_of(
            Unauthenticated("a valid API key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`"),
            request.path,
        )
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    return middleware
