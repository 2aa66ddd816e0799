"""A caller of a stream, kept company while its answer is on the way: the stream begins early and carries comments until the first byte.

Proxies cut streams that are silent, and people like to see why they wait. Knows server-sent events; nothing of models.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class SseKeepAlive:
    """`comment` gives what to say now. `first_after_s`: silence before the first comment, and so before the stream begins."""

    def __init__(
        self, request: web.Request, request_id: str, comment: Callable[[], str], *, first_after_s: float, every_s: float
    ) -> None:
        self._request = request
        self._request_id = request_id
        self._comment = comment
        self._next_after_s = first_after_s
        self._every_s = every_s
        self.response: web.StreamResponse | None = None

    async def company(self, work: Awaitable[T]) -> T:
        """Wait for `work`, commenting. If the caller leaves, the work is cancelled and has ended when this does."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                done, _ = await asyncio.wait([task], timeout=self._next_after_s)
                if done:
                    return task.result()
                response = await self.begin()
                await response.write(f": {self._comment()}\n\n".encode())
                self._next_after_s = self._every_s
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def begin(self) -> web.StreamResponse:
        if self.response is None:
            self.response = web.StreamResponse(headers={**HEADERS, "X-Request-Id": self._request_id})
            await self.response.prepare(self._request)
        return self.response
