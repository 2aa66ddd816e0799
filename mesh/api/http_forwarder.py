"""Carries one HTTP request to a target and holds the response: its status, its headers and the bytes that have arrived."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import quote

import aiohttp
from yarl import URL

from common.log_headers import CALLER_HEADER, LOG_HEADERS, LOGGED_HEADER, NAME_HEADER, WAITED_HEADER
from common.not_here import NOT_HERE_HEADER
from mesh.access.peer_keys import PEER_HEADERS
from mesh.api.addressing import MODEL_HEADER
from mesh.client.connections import Connections
from mesh.errors import NotSupported, Unavailable
from mesh.routing.attempts import Attempt
from mesh.routing.retry_policy import Failure
from mesh.types import Target

Headers = list[tuple[str, str]]

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "expect",
        "origin",  # checked here; the runtime would check it against its own name
    }
)
_KEY_HEADERS = ("authorization", "x-api-key")
_NOT_FOUND = 404
_NOT_FOUND_CODE = b"model_not_found"  # other runtimes' mark: OpenAI's code in the error's JSON
_UNAVAILABLE = (502, 503)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A client's request as it is forwarded: the path with its query, the end-to-end headers and the decoded body.

    A body that is not read here is an iterator, and its request can be sent once.

    The runtime logs what follows: `name` is the model's name as the client wrote it, `caller` the name of the client's key, and `started_s`
    the monotonic time of the request's arrival.
    """

    method: str
    path: str
    headers: Headers
    body: bytes | AsyncIterator[bytes] | None
    name: str = ""
    caller: str = ""
    started_s: float = field(default_factory=time.monotonic)


class HttpForwarder:
    """A context manager that closes the response of the last `forward`. One that was not read to its end loses its connection, which frees the row.

    `peer_headers`: what a request to another pod carries.
    """

    def __init__(
        self, connections: Connections, peer_headers: Callable[[], Sequence[tuple[str, str]]], request: HttpRequest
    ) -> None:
        self._connections = connections
        self._peer_headers = peer_headers
        self._request = request
        self._response: aiohttp.ClientResponse | None = None
        self._first_chunk = b""
        self._error = ""
        self._attempt: Attempt | None = None
        # When the last attempt began, if it went to this pod's runtime.
        self.local_since_s: float | None = None

    def __enter__(self) -> "HttpForwarder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def forward(self, attempt: Attempt) -> None:
        """Send the request and wait for the response's first bytes. Sets the attempt's `failure`. Raises NotSupported."""
        self._close()
        target = attempt.target
        if not target.http_address:
            raise NotSupported("its runtime has no HTTP API; call it by gRPC", model=attempt.model_id)
        self.local_since_s = time.monotonic() if target.local else None
        self._attempt = attempt
        session, base = self._connections.http(target.http_address, of_pod=target.is_peer)
        try:
            async with attempt.until_lost():
                self._response = await session.request(
                    self._request.method,
                    URL(base + self._request.path, encoded=True),
                    data=self._request.body,
                    headers=self._headers(attempt.model_id, target),
                    allow_redirects=False,
                )
                self._first_chunk = await self._response.content.readany()
        except TimeoutError:
            self._close()
            self._error = f"{target.instance_id} does not answer any more"
        except (aiohttp.ClientError, OSError) as error:
            self._close()
            self._error = f"{type(error).__name__}: {error}"
        attempt.failure = self._failure()
        if attempt.failure is None:
            attempt.begin_response()

    def raise_if_unanswered(self) -> None:
        """Raise Unavailable if the target did not answer or closed the connection first."""
        if self._response is None:
            raise Unavailable(self._error)

    @property
    def response(self) -> aiohttp.ClientResponse:
        """The response's status and headers, after `raise_if_unanswered`."""
        assert self._response is not None
        return self._response

    @property
    def first_chunk(self) -> bytes:
        """The first bytes of the body, which are no longer in the response's content. Empty if the body is."""
        return self._first_chunk

    @property
    def is_logged(self) -> bool:
        """Whether another process of this pod logs the request, so that this one need not."""
        if self._attempt is not None and self._attempt.target.is_control:
            return True
        return self.local_since_s is not None and LOGGED_HEADER in self.response.headers

    @property
    def whole_body(self) -> bytes | None:
        """The body if all of it has arrived with the headers."""
        length = self.response.headers.get("Content-Length")
        return self._first_chunk if length == str(len(self._first_chunk)) else None

    def until_lost(self) -> AbstractAsyncContextManager[None]:
        """Return a context that raises TimeoutError in its body when the target of the response is lost."""
        assert self._attempt is not None
        return self._attempt.until_lost()

    def _failure(self) -> Failure | None:
        if self._response is None or self._response.status in _UNAVAILABLE:
            return Failure.UNAVAILABLE
        # Any other 404 is an unknown path, which loading the model does not change.
        if self._response.status == _NOT_FOUND and (
            NOT_HERE_HEADER in self._response.headers or _NOT_FOUND_CODE in self._first_chunk
        ):
            return Failure.MODEL_LOST
        return None

    def _headers(self, model_id: str, target: Target) -> Headers:
        """Return the headers for a target. The client's key goes to another pod, never to a runtime."""
        if target.is_control:
            return self._request.headers
        headers = [
            (key, value)
            for key, value in end_to_end(self._request.headers)
            if not target.local or key.lower() not in _KEY_HEADERS
        ]
        headers.append((MODEL_HEADER, model_id))
        if target.local:
            headers.append((NAME_HEADER, quote(self._request.name)))
            headers.append((CALLER_HEADER, quote(self._request.caller)))
            headers.append((WAITED_HEADER, f"{time.monotonic() - self._request.started_s:.3f}"))
        else:
            headers += self._peer_headers()
        return headers

    def _close(self) -> None:
        if self._response is not None:
            self._response.release() if self._response.content.at_eof() else self._response.close()
        self._response, self._first_chunk, self._error = None, b"", ""


def end_to_end(headers: Headers) -> Headers:
    """Return the headers without those of one connection and without the mesh's own."""
    named = {name.strip().lower() for key, value in headers if key.lower() == "connection" for name in value.split(",")}
    return [
        (key, value)
        for key, value in headers
        if (low := key.lower()) not in _HOP_BY_HOP
        and low not in named
        and low not in PEER_HEADERS
        and low not in LOG_HEADERS
        and not low.startswith("mm-")
    ]
