"""OpenAI's HTTP API by model name: any POST below /v1 goes to a copy of the model that its body names, and the answer's bytes come back.

Knows `model` and `stream` of a body and nothing else of it. A request whose model isn't loaded is held: a stream begins at once and carries
comments meanwhile, anything else just waits.
"""

import contextlib
import logging
import time

import aiohttp
from aiohttp import web

from mesh.api.addressing import MODEL_HEADER
from mesh.api.http_attempt import HttpAttempt, UnreachableError, end_to_end
from mesh.api.http_body import Ask, decode, prefix_hash, read_body
from mesh.api.http_errors import body_of, event_of
from mesh.api.request_log import Record
from mesh.api.sse_keepalive import SseKeepAlive
from mesh.client.connections import HOP_HEADER, Connections
from mesh.errors import InvalidRequest, MeshError, NotFound, Unavailable
from mesh.metrics import Metrics
from mesh.registry.registry import Registry
from mesh.routing.router import CopyRouter
from mesh.types import CopyState, Loader

logger = logging.getLogger(__name__)

_FIRST_COMMENT_S = 0.2  # an error that is known at once still gets its own status
_OK = 200
_DONE = b"data: [DONE]\n\n"


class OpenAiGateway:
    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        router: CopyRouter,
        connections: Connections,
        metrics: Metrics,
        *,
        own_id: str,
        max_body_bytes: int,
        keep_alive_s: float,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._router = router
        self._connections = connections
        self._metrics = metrics
        self._own_id = own_id
        self._max_body_bytes = max_body_bytes
        self._keep_alive_s = keep_alive_s

    async def post(self, request: web.Request) -> web.StreamResponse:
        record = Record.of(request)
        body = await read_body(request, self._max_body_bytes)
        ask = decode(body, Ask)
        here = HOP_HEADER in request.headers
        record.model_id = request.headers.get(MODEL_HEADER, "") if here else await self._resolve(ask)
        waits = not self._router.is_loaded(record.model_id)
        held = SseKeepAlive(
            request,
            record.request_id,
            lambda: self._comment(record.model_id),
            first_after_s=min(_FIRST_COMMENT_S, self._keep_alive_s) if waits else self._keep_alive_s,
            every_s=self._keep_alive_s,
        )
        try:
            return await self._pass_on(
                request, record, body, held if ask.stream else None, "" if here else ask.model or ""
            )
        except (MeshError, UnreachableError) as error:
            mesh_error = Unavailable(str(error)) if isinstance(error, UnreachableError) else error
            if held.response is None:
                raise mesh_error from None
            record.code = mesh_error.code
            return await _finish(held.response, event_of(body_of(mesh_error)))

    async def _pass_on(
        self, request: web.Request, record: Record, body: bytes, held: SseKeepAlive | None, name: str
    ) -> web.StreamResponse:
        """`name`: what the caller calls the model; empty if another pod sent it here by its id."""
        here = not name
        exclude: frozenset[str] = frozenset()
        reloaded = retried = moved = False
        # the body was decoded as it was read
        headers = [
            (key, value)
            for key, value in request.headers.items()
            if key.lower() not in ("x-request-id", "content-encoding")
        ]
        headers.append(("X-Request-Id", record.request_id))
        prefix = prefix_hash(body)
        while True:
            exchange = HttpAttempt(self._router, self._connections, record.model_id, self._own_id)
            opening = exchange.open(
                request.method, request.raw_path, headers, body, prefix_hash=prefix, exclude=exclude, here=here
            )
            try:
                try:
                    await (held.company(opening) if held else opening)
                except NotFound:
                    # the name has moved to another model between its resolution and now
                    successor = None if here or moved else await self._registry.successor(name, record.model_id)
                    if successor is None:
                        raise
                    record.model_id, moved, reloaded = successor, True, False
                    continue
                except UnreachableError:
                    if retried or here or exchange.target is None:
                        raise
                    retried, exclude = True, frozenset({exchange.target.instance_id})
                    continue
                assert exchange.target is not None
                if exchange.is_gone and not reloaded:
                    reloaded = True
                    self._router.forget(record.model_id, exchange.target)
                    continue
                if exchange.is_away and not retried and not here:
                    retried, exclude = True, frozenset({exchange.target.instance_id})
                    continue
                self._metrics.first_byte(record.model_id, time.monotonic() - record.started_s)
                return await self._relay(request, record, exchange, held)
            finally:
                await exchange.close()

    async def _relay(
        self, request: web.Request, record: Record, exchange: HttpAttempt, held: SseKeepAlive | None
    ) -> web.StreamResponse:
        answer = exchange.answer
        assert answer is not None
        if held is not None and held.response is not None and answer.status != _OK:
            # the stream has begun as if all were well: what came instead is its last event
            record.code = str(answer.status)
            return await _finish(held.response, event_of(exchange.first + await answer.content.read()))
        record.code = str(answer.status)
        response = held.response if held is not None else None
        if response is None:
            length = answer.headers.get("Content-Length")
            whole = length == str(len(exchange.first))
            # an answer that is all here leaves in one write
            response = web.Response(body=exchange.first) if whole else web.StreamResponse()
            response.set_status(answer.status, answer.reason)
            response.headers.pop("Content-Type", None)
            for key, value in end_to_end(list(answer.headers.items())):
                response.headers.add(key, value)
            response.headers["X-Request-Id"] = record.request_id
            if whole:
                return response
            if length is not None:
                response.headers["Content-Length"] = length
            await response.prepare(request)
        try:
            chunk, tail = exchange.first, b""
            while chunk:
                await response.write(chunk)
                tail = (tail + chunk[-len(_DONE) :])[-len(_DONE) :]
                # OpenAI's own client leaves as soon as it has read this, which is no cancellation
                record.answered = tail == _DONE
                chunk = await answer.content.readany()
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            record.code = "UNAVAILABLE"
            logger.warning(
                "an answer broke off",
                extra={"request_id": record.request_id, "model": record.model_id, "error": str(error)},
            )
            if response.content_type != "text/event-stream":
                _break_off(request)
                return response
            broken = Unavailable(f"model {self._registry.name_of(record.model_id)}: the answer broke off")
            return await _finish(response, event_of(body_of(broken)))
        await response.write_eof()
        return response

    async def _resolve(self, ask: Ask) -> str:
        if not ask.model:
            raise InvalidRequest("model is missing: it names the model to use")
        try:
            return self._registry.resolve(ask.model)
        except NotFound:
            return await self._registry.resolve_fresh(ask.model)

    def _comment(self, model_id: str) -> str:
        copy = next((copy for copy in self._loader.status(model_id).copies if copy.state is not None), None)
        if copy is None or copy.state in (
            CopyState.LOADED,
            CopyState.FAILED,
            CopyState.QUARANTINED,
            CopyState.UNLOADING,
        ):
            return "keep-alive"
        progress = f" {copy.progress:.0%}".replace("%", " %") if copy.progress else ""
        text = f" {copy.progress_text}" if copy.progress_text else ""
        return f"{copy.state}{progress}{text}".replace("\n", " ")


async def _finish(response: web.StreamResponse, last: bytes) -> web.StreamResponse:
    with contextlib.suppress(ConnectionError):
        await response.write(last)
        await response.write_eof()
    return response


def _break_off(request: web.Request) -> None:
    """An answer whose length was promised can't be ended otherwise: the caller must see that it isn't whole."""
    if request.transport is not None:
        request.transport.abort()
