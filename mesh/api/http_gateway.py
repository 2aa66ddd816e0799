"""Forwards HTTP requests by model name, for every protocol: a request goes to a copy of its model, which is loaded first if need be.

A request for an event stream whose model is not loaded gets SSE comments until it is; any other request waits.
"""

import time

from aiohttp import web

from common.model_state import CopyState
from mesh.access.caller import current_caller
from mesh.access.peer_keys import PeerKeys
from mesh.api.addressing import MODEL_HEADER
from mesh.api.error_shapes import shape_for
from mesh.api.http_body import prefix_hash, read_body
from mesh.api.http_forwarder import HttpForwarder, HttpRequest
from mesh.api.http_relay import end_stream, relay
from mesh.api.http_request import target_of
from mesh.api.request_log import Record
from mesh.api.request_memory import RequestMemory
from mesh.api.sse_keepalive import SseKeepAlive
from mesh.client.connections import Connections
from mesh.errors import InvalidRequest, MeshError
from mesh.observability.metrics import Metrics
from mesh.registry.registry import Registry
from mesh.routing.attempts import Attempts, RoutingRequest
from mesh.routing.router import CopyRouter
from mesh.types import ModelStatus, ModelStatuses

_FIRST_COMMENT_S = 0.2  # an error that is known at once still gets its own status


class HttpGateway:
    """`keep_alive_s`: the silence after which a streaming client gets a comment."""

    def __init__(
        self,
        registry: Registry,
        states: ModelStatuses,
        router: CopyRouter,
        connections: Connections,
        metrics: Metrics,
        *,
        peers: PeerKeys,
        max_body_bytes: int,
        memory: RequestMemory,
        keep_alive_s: float,
    ) -> None:
        self._registry = registry
        self._states = states
        self._router = router
        self._connections = connections
        self._metrics = metrics
        self._peers = peers
        self._max_body_bytes = max_body_bytes
        self._memory = memory
        self._keep_alive_s = keep_alive_s

    async def read(self, request: web.Request) -> bytes:
        """Return the request's body, which counts in the request memory until the request has ended. Raises as `read_body`."""
        record = Record.of(request)
        record.memory = self._memory.hold()
        return await read_body(request, self._max_body_bytes, record.memory)

    async def forward(
        self, request: web.Request, body: bytes, name: str | None, *, wants_events: bool = False
    ) -> web.StreamResponse:
        """Answer with the response of a copy of the model `name`, or of the model that a peer's header names.

        `wants_events`: the client expects an event stream. Raises InvalidRequest without a name, NotFound, and as CopyRouter.route.
        """
        record = Record.of(request)
        record.is_inference = True
        record.request_bytes = len(body)
        record.name = name or ""
        from_peer = current_caller().is_peer
        record.model_id = request.headers.get(MODEL_HEADER, "") if from_peer else await self._resolve(name)
        routing = RoutingRequest(
            "" if from_peer else name or "",
            record.model_id,
            prefix_hash=prefix_hash(body),
            local_only=from_peer,
        )
        headers = _headers(request, record.request_id)
        forwarded = HttpRequest(
            request.method, target_of(request), headers, body, name or "", current_caller().name, record.started_s
        )
        with (
            self._router.attempts(routing) as attempts,
            HttpForwarder(self._connections, self._peers.headers, forwarded) as forwarder,
        ):
            # The pod that the client called sends the comments: one from here would keep that pod from asking another one.
            keep_alive = self._keep_alive(request, record, attempts) if wants_events and not from_peer else None
            try:
                return await self._answer(request, record, attempts, forwarder, keep_alive)
            except MeshError as error:
                if keep_alive is None or keep_alive.response is None:
                    raise
                record.code = error.code
                shape = shape_for(request.path)
                return await end_stream(keep_alive.response, shape.event(shape.body(error)))

    async def _answer(
        self,
        request: web.Request,
        record: Record,
        attempts: Attempts,
        forwarder: HttpForwarder,
        keep_alive: SseKeepAlive | None,
    ) -> web.StreamResponse:
        first_byte = _first_byte(attempts, forwarder)
        try:
            await (keep_alive.keep_alive_during(first_byte) if keep_alive else first_byte)
        finally:
            record.model_id = attempts.model_id
        record.first_s = record.elapsed_s
        record.is_logged = forwarder.is_logged
        self._metrics.first_byte(record.model_id, record.first_s)
        begun = keep_alive.response if keep_alive else None
        try:
            return await relay(request, record, forwarder, begun, self._registry.name_of(record.model_id))
        finally:
            if forwarder.local_since_s is not None:
                self._metrics.invoked(record.route, record.code, time.monotonic() - forwarder.local_since_s)

    async def _resolve(self, name: str | None) -> str:
        if not name:
            raise InvalidRequest("model is missing: it names the model to use", param="model")
        return await self._registry.resolve_known(name, virtual=False)

    def _keep_alive(self, request: web.Request, record: Record, attempts: Attempts) -> SseKeepAlive:
        return SseKeepAlive(
            request,
            record.request_id,
            lambda: self._comment(attempts.model_id),
            is_waiting=lambda: attempts.is_waiting or self._is_loading(attempts.model_id),
            first_after_s=_FIRST_COMMENT_S,
            every_s=self._keep_alive_s,
        )

    def _is_loading(self, model_id: str) -> bool:
        """Return whether requests wait for the model at the pod that loads it."""
        return self._states.status(model_id).status is not ModelStatus.LOADED

    def _comment(self, model_id: str) -> str:
        """Return the load's state and progress, such as `pulling 42 % of the files`."""
        copies = self._states.status(model_id).copies
        model = next((copy.model for copy in copies if copy.model.state is not CopyState.UNKNOWN), None)
        if model is None or model.state in (
            CopyState.LOADED,
            CopyState.FAILED,
            CopyState.QUARANTINED,
            CopyState.UNLOADING,
        ):
            return "keep-alive"
        progress = f" {model.progress:.0%}".replace("%", " %") if model.progress else ""
        text = f" {model.progress_text}" if model.progress_text else ""
        return f"{model.state}{progress}{text}".replace("\n", " ")


async def _first_byte(attempts: Attempts, forwarder: HttpForwarder) -> None:
    """Return when a response has begun that goes to the client. Raises as CopyRouter.route, and Unavailable if no target answered."""
    async for attempt in attempts:
        await forwarder.forward(attempt)
    forwarder.raise_if_unanswered()


def _headers(request: web.Request, request_id: str) -> list[tuple[str, str]]:
    """Return the headers to forward; the body was decoded as it was read."""
    headers = [
        (key, value)
        for key, value in request.headers.items()
        if key.lower() not in ("x-request-id", "content-encoding")
    ]
    headers.append(("X-Request-Id", request_id))
    return headers
