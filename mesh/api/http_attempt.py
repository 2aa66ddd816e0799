"""One attempt at passing an HTTP request on: a copy is chosen, the request sent, the answer's beginning awaited.

Knows targets and HTTP; looks into neither body. Whatever happens, `close` returns what was taken: the connection and the copy's count.
"""

import aiohttp
from yarl import URL

from mesh.api.addressing import MODEL_HEADER
from mesh.client.connections import HOP_HEADER, Connections
from mesh.errors import NotSupported
from mesh.routing.router import CopyRouter
from mesh.types import Target

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
    }
)
_ABSENT = 404
_ABSENT_CODE = b"model_not_found"  # OpenAI's, in the error's JSON
_AWAY = (502, 503)


class UnreachableError(Exception):
    """The target didn't answer, or ended before its answer's first byte."""


class HttpAttempt:
    def __init__(self, router: CopyRouter, connections: Connections, model_id: str, own_id: str) -> None:
        self._router = router
        self._connections = connections
        self._model_id = model_id
        self._own_id = own_id
        self.target: Target | None = None
        self.answer: aiohttp.ClientResponse | None = None
        self.first = b""

    async def open(
        self,
        method: str,
        path: str,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        prefix_hash: str,
        exclude: frozenset[str],
        here: bool,
    ) -> None:
        """Returns with the answer's status, headers and first bytes. Raises as CopyRouter.route, and UnreachableError."""
        self.target = await self._router.route(
            self._model_id, deadline_s=None, prefix_hash=prefix_hash, exclude=exclude, here=here
        )
        if not self.target.http_address:
            raise NotSupported(f"model {self._model_id}: its runtime has no HTTP API; call it by gRPC")
        session, base = self._connections.http(self.target.http_address)
        try:
            self.answer = await session.request(
                method,
                URL(base + path, encoded=True),
                data=body,
                headers=self._onward(headers),
                allow_redirects=False,
            )
            self.first = await self.answer.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{type(error).__name__}: {error}") from None

    @property
    def is_gone(self) -> bool:
        """The target says that it hasn't got the model; an unknown path is something else, and no reason to load anything."""
        return self.answer is not None and self.answer.status == _ABSENT and _ABSENT_CODE in self.first

    @property
    def is_away(self) -> bool:
        return self.answer is not None and self.answer.status in _AWAY

    async def close(self) -> None:
        if self.answer is not None:
            # an answer that wasn't read to its end takes the connection with it, and so the row is freed
            self.answer.close() if not self.answer.content.at_eof() else self.answer.release()
        if self.target is not None:
            self._router.end(self._model_id, self.target)
            self.target = None

    def _onward(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        assert self.target is not None
        passed = [
            (key, value)
            for key, value in end_to_end(headers)
            if not self.target.local or key.lower() != "authorization"
        ]
        passed.append((MODEL_HEADER, self._model_id))
        if not self.target.local:
            passed.append((HOP_HEADER, self._own_id))
        return passed


def end_to_end(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without what belongs to one connection, and without our own."""
    named = {name.strip().lower() for key, value in headers if key.lower() == "connection" for name in value.split(",")}
    return [
        (key, value)
        for key, value in headers
        if (low := key.lower()) not in _HOP_BY_HOP
        and low not in named
        and low != HOP_HEADER
        and not low.startswith("mm-")
    ]
