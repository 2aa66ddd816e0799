"""Opens urllib's HTTP connections to addresses that `Destinations` has checked, for the first request and for each redirect."""

import http.client
import ssl
import urllib.parse
import urllib.request
from typing import Any

from runtime.puller.progress import PullJob
from runtime.puller.sources.destinations import Destinations

_TIMEOUT_S = 60.0
_CONNECT_S = 10.0


class _CheckedConnection(http.client.HTTPConnection):
    def __init__(self, host: str, destinations: Destinations, job: PullJob, timeout_s: float) -> None:
        super().__init__(host, timeout=timeout_s)
        self._destinations = destinations
        self._job = job
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = self._destinations.connect(self.host, self.port, _CONNECT_S)
        self.sock.settimeout(self._timeout_s)
        self._job.opened(self.sock)


class _CheckedTlsConnection(_CheckedConnection):
    default_port = http.client.HTTPS_PORT

    def __init__(
        self, host: str, destinations: Destinations, job: PullJob, timeout_s: float, context: ssl.SSLContext
    ) -> None:
        super().__init__(host, destinations, job, timeout_s)
        self._tls = context

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)
        self._job.opened(self.sock)


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, destinations: Destinations, job: PullJob) -> None:
        super().__init__()
        self._destinations = destinations
        self._job = job

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if _is_proxied(req):
            self._destinations.check_behind_proxy(urllib.parse.urlsplit(req.full_url).hostname or "")
            return super().http_open(req)

        def connection(host: str, /, *, timeout: float = _TIMEOUT_S, **_: Any) -> _CheckedConnection:
            return _CheckedConnection(host, self._destinations, self._job, timeout)

        return self.do_open(connection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, destinations: Destinations, job: PullJob, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._destinations = destinations
        self._job = job
        self._tls = context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if _is_proxied(req):
            self._destinations.check_behind_proxy(urllib.parse.urlsplit(req.full_url).hostname or "")
            return super().https_open(req)

        def connection(host: str, /, *, timeout: float = _TIMEOUT_S, **_: Any) -> _CheckedTlsConnection:
            return _CheckedTlsConnection(host, self._destinations, self._job, timeout, self._tls)

        return self.do_open(connection, req)


def checked_handlers(
    destinations: Destinations, context: ssl.SSLContext, job: PullJob
) -> tuple[urllib.request.BaseHandler, urllib.request.BaseHandler]:
    """Return handlers for http and https, whose connections end when the job is cancelled. A proxy that the environment names is connected to unchecked, because the operator chose it."""
    return _HttpHandler(destinations, job), _HttpsHandler(destinations, job, context)


def _is_proxied(request: urllib.request.Request) -> bool:
    """Whether urllib's proxy handler has replaced the request's host by a proxy's."""
    proxies = {_host_of(proxy) for proxy in urllib.request.getproxies().values()}
    return request.host in proxies and request.host != _host_of(request.full_url)


def _host_of(url: str) -> str:
    netloc = urllib.parse.urlsplit(url if "//" in url else f"//{url}").netloc
    return urllib.parse.unquote(netloc.rpartition("@")[2])
