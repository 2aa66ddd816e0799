"""Applies the rules of Host, Origin and CORS to the pod's HTTP port."""

import socket
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from common.addresses import parse_address
from common.web_policy import WebPolicy
from mesh.access.scopes import OPEN, http_scopes
from mesh.errors import PermissionDenied


class WebGuard:
    """`is_keyless`: requests need no key, so a page could call in the name of the person who looks at it. `is_peer`: whether a request is another pod's."""

    def __init__(self, policy: WebPolicy | None, *, is_keyless: bool, is_peer: Callable[[web.Request], bool]) -> None:
        self._policy = policy
        self._is_peer = is_peer
        self._is_keyless = is_keyless

    def add_to(self, app: web.Application) -> None:
        if self._policy is not None:
            app.on_response_prepare.append(self._add_headers)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer preflight requests, and 403 for pages that may not call. Raises PermissionDenied."""
        policy = self._policy
        if policy is None or self._is_peer(request):
            return await handler(request)
        if preflight := policy.preflight_headers(request.method, request.headers):
            return web.Response(status=204, headers=preflight)
        if self._is_keyless and not is_open(request) and (refusal := policy.refusal(request.method, request.headers)):
            raise PermissionDenied(refusal)
        return await handler(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        assert self._policy is not None
        for name, value in self._policy.response_headers(request.headers.get("Origin")).items():
            response.headers.setdefault(name, value)


def is_open(request: web.Request) -> bool:
    """Return whether a route is open to every client, as probes are, which use any host name."""
    resource = request.match_info.route.resource
    return resource is not None and http_scopes(request.method, resource.canonical) == OPEN


def policy_for(listen: str, names: tuple[str, ...], origins: tuple[str, ...]) -> WebPolicy | None:
    """Return the policy of a listener; None for a unix socket, which no browser reaches. `names`: its other host names."""
    address = parse_address(listen)
    if address.path:
        return None
    return WebPolicy.of_listener(address.host, (*names, socket.gethostname()), origins)
