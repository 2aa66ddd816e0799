"""Sends one streamed response: headers with the first event, one write per delta, errors as events, keep-alives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from runtime.api.http_errors import internal
from runtime.errors import RepertoryError
from runtime.generation.merge import close
from runtime.generation.parts import Delta
from runtime.observability.request_record import RequestRecord

KEEP_ALIVE_S = 15.0
_LARGE_BYTES = 16384
_CANCELLED = "CANCELLED"  # the client closed the connection
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Framing:
    """The format of a stream. `keep_alive` is sent while there are no events, and clients ignore it; empty = the format has none."""

    content_type: str
    keep_alive: bytes = b""


SERVER_SENT_EVENTS = Framing("text/event-stream; charset=utf-8", b": keep-alive\n\n")
JSON_LINES = Framing("application/x-ndjson")


class StreamEncoder(Protocol):
    """Turns the deltas of one response into events."""

    @property
    def num_events(self) -> int:
        """The number of events so far."""

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's events, which may be none."""

    def end(self) -> bytes:
        """Return what follows the last delta."""

    def error(self, error: RepertoryError) -> bytes:
        """Return the events of an error, after which nothing follows."""


async def send_events(
    request: web.Request,
    deltas: AsyncIterator[Delta],
    chunks: StreamEncoder,
    warning: str | None,
    framing: Framing = SERVER_SENT_EVENTS,
) -> web.StreamResponse:
    """Send the whole response. An error before the first event is raised, so that it gets an HTTP status of its own."""
    response = web.StreamResponse(headers={"Content-Type": framing.content_type, **_HEADERS})
    if warning is not None:
        response.headers["Warning"] = warning
    first: asyncio.Task[Delta] = asyncio.ensure_future(_next(deltas))
    comments = _Comments(response, chunks, framing.keep_alive)
    record = RequestRecord.current()
    try:
        done, _ = await asyncio.wait({first}, timeout=KEEP_ALIVE_S)
        if done:
            first.result()
        await response.prepare(request)
        comments.start()
        last = b""
        try:
            await _write(response, chunks.delta(await first))
            second = await anext(deltas, None)
            if second is not None:
                # Each delta resumes every frame of its task. This one has none of the middlewares and handlers, which cost 1 µs each time.
                await asyncio.create_task(_write_deltas(response, chunks, second, deltas))
            last = chunks.end()
        except ConnectionError:
            record.code = _CANCELLED
        except Exception as error:
            known = internal(error)
            record.code = known.code
            last = chunks.error(known)
        comments.stop()  # nothing may be written after the end
        await response.write_eof(last)
    except ConnectionError:
        record.code = _CANCELLED
    finally:
        comments.stop()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await close(deltas)
    return response


async def _write_deltas(
    response: web.StreamResponse, chunks: StreamEncoder, first: Delta, rest: AsyncIterator[Delta]
) -> None:
    await _write(response, chunks.delta(first))
    async for delta in rest:
        await _write(response, chunks.delta(delta))


async def _write(response: web.StreamResponse, data: bytes) -> None:
    if data:
        await response.write(data)
    if len(data) > _LARGE_BYTES:
        await asyncio.sleep(0)  # encoding a prompt's log-probabilities took milliseconds: let other requests run


async def _next(deltas: AsyncIterator[Delta]) -> Delta:
    return await anext(deltas)


class _Comments:
    """Sends comments while nothing else is sent, since proxies close idle streams.

    A timer costs a stream less than a task that sleeps, and few streams are silent for so long.
    """

    def __init__(self, response: web.StreamResponse, chunks: StreamEncoder, comment: bytes) -> None:
        self._response = response
        self._chunks = chunks
        self._comment = comment
        self._seen = -1
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._seen = self._chunks.num_events
        if self._comment:
            self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            self._writing.cancel()

    def _look(self) -> None:
        is_free = self._writing is None or self._writing.done()
        if is_free and self._chunks.num_events == self._seen:
            self._writing = asyncio.create_task(self._write())
        self.start()

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._response.write(self._comment)
