"""Sends SSE comments to a streaming client until the first byte of the response arrives.

Proxies close silent streams, and the comments show the progress of the load.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class SseKeepAlive:
    """Begins the stream with its first comment; `response` is None until then.

    A comment follows each `every_s` of silence. The first one comes after `first_after_s` if `is_waiting()` says that the request waits for its model.
    """

    def __init__(
        self,
        request: web.Request,
        request_id: str,
        comment: Callable[[], str],
        *,
        is_waiting: Callable[[], bool],
        first_after_s: float,
        every_s: float,
    ) -> None:
        self._request = request
        self._request_id = request_id
        self._comment = comment
        self._is_waiting = is_waiting
        self._first_after_s = min(first_after_s, every_s)
        self._every_s = every_s
        self.response: web.StreamResponse | None = None

    async def keep_alive_during(self, work: Awaitable[T]) -> T:
        """Await `work` while sending comments. If the client leaves, cancel `work` and return after it has ended."""
        task = asyncio.ensure_future(work)
        try:
            pause_s = self._first_after_s
            if await _ends_within(task, pause_s):
                return task.result()
            if not self._is_waiting() and await _ends_within(task, self._every_s - pause_s):
                return task.result()
            while True:
                response = await self._begin()
                await response.write(f": {self._comment()}\n\n".encode())
                if await _ends_within(task, self._every_s):
                    return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def _begin(self) -> web.StreamResponse:
        if self.response is None:
            self.response = web.StreamResponse(headers={**HEADERS, "X-Request-Id": self._request_id})
            await self.response.prepare(self._request)
        return self.response


async def _ends_within(task: asyncio.Future[T], timeout_s: float) -> bool:
    done, _ = await asyncio.wait([task], timeout=timeout_s)
    return bool(done)
