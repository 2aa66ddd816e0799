"""Relays a forwarded HTTP response to the client, also where an event stream to the client has begun before it."""

import asyncio
import contextlib
import logging
from typing import TypeVar

import aiohttp
from aiohttp import web

from mesh.api.error_shapes import shape_for
from mesh.api.http_forwarder import HttpForwarder, end_to_end
from mesh.api.request_log import Record
from mesh.errors import Unavailable

logger = logging.getLogger(__name__)

Response = TypeVar("Response", bound=web.StreamResponse)

_OK = 200
_DONE = b"data: [DONE]\n\n"


async def relay(
    request: web.Request, record: Record, forwarder: HttpForwarder, begun: web.StreamResponse | None, model_name: str
) -> web.StreamResponse:
    """Pass the response on. `begun`: the event stream that the client is reading already, if there is one."""
    status = forwarder.response.status
    record.code = str(status)
    if begun is not None and status != _OK:
        # The client was sent status 200 before, so the error becomes the stream's last event.
        answer = forwarder.first_chunk + await forwarder.response.content.read()
        return await end_stream(begun, shape_for(request.path).event(answer))
    if begun is None and (body := forwarder.whole_body) is not None:
        record.response_bytes = len(body)
        return _with_head(web.Response(body=body), record, forwarder)  # leaves in one write
    response = begun
    if response is None:
        response = _with_head(web.StreamResponse(), record, forwarder)
        if (length := forwarder.response.headers.get("Content-Length")) is not None:
            response.headers["Content-Length"] = length
        await response.prepare(request)
    try:
        async with forwarder.until_lost():
            # Each chunk resumes every frame of its task. This one has none of the middlewares and handlers, which cost 1 µs each time.
            await asyncio.create_task(_relay_chunks(record, forwarder, response))
    except (TimeoutError, aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        return await _broken_off(request, record, response, error, model_name)
    await response.write_eof()
    return response


async def end_stream(response: web.StreamResponse, last: bytes) -> web.StreamResponse:
    """Write the last event and end the stream; a client that has left does not count as an error."""
    with contextlib.suppress(ConnectionError):
        await response.write(last)
        await response.write_eof()
    return response


def _with_head(response: Response, record: Record, forwarder: HttpForwarder) -> Response:
    response.set_status(forwarder.response.status, forwarder.response.reason)
    response.headers.pop("Content-Type", None)
    for key, value in end_to_end(list(forwarder.response.headers.items())):
        response.headers.add(key, value)
    response.headers["X-Request-Id"] = record.request_id
    return response


async def _relay_chunks(record: Record, forwarder: HttpForwarder, response: web.StreamResponse) -> None:
    write, content = response.write, forwarder.response.content
    tail, chunk = b"", forwarder.first_chunk
    while chunk:
        await write(chunk)
        record.response_bytes += len(chunk)
        tail = (tail + chunk)[-len(_DONE) :] if len(chunk) < len(_DONE) else chunk[-len(_DONE) :]
        # OpenAI's own client disconnects as soon as it has read this, which is not a cancellation.
        record.answered = tail == _DONE
        chunk = await content.readany()


async def _broken_off(
    request: web.Request, record: Record, response: web.StreamResponse, error: Exception, model_name: str
) -> web.StreamResponse:
    """End a response whose source broke off so that the client notices: with an error event, or by closing the connection."""
    record.code = "UNAVAILABLE"
    record.is_logged = False  # the runtime may have died before it logged anything
    logger.warning(
        "a response broke off", extra={"request_id": record.request_id, "model": record.model_id, "error": str(error)}
    )
    shape = shape_for(request.path)
    body = shape.body(Unavailable("the answer broke off", model=model_name))
    if response.content_type == "text/event-stream":
        return await end_stream(response, shape.event(body))
    if response.content_type == "application/x-ndjson":
        return await end_stream(response, body + b"\n")
    if request.transport is not None:
        request.transport.abort()
    return response
