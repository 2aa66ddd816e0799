"""Serves HTTP in a worker: sends requests for loaded models to this pod's runtime, and passes all others on to the control process unread."""

from collections.abc import AsyncIterator

from aiohttp import web

from common.web_policy import WebPolicy
from mesh.access.caller import current_caller
from mesh.access.key_table import KeyTable
from mesh.access.tls import TlsIdentity
from mesh.api.adapter_choice import AdapterFields
from mesh.api.connection_limits import ConnectionLimits
from mesh.api.http_body import InferenceBody, decode, read_body
from mesh.api.http_errors import errors_as_json
from mesh.api.http_forwarder import Headers, HttpForwarder, HttpRequest
from mesh.api.http_listeners import HttpListeners
from mesh.api.http_relay import relay
from mesh.api.http_request import http_secrets, target_of
from mesh.api.request_log import Record, request_log
from mesh.api.request_memory import RequestMemory
from mesh.api.routes.openai_routes import MODEL_IN_BODY_PATHS
from mesh.client.connections import Connections
from mesh.envoy.plan import Carrier
from mesh.envoy.routes import HTTP_EXCEPTIONS
from mesh.errors import InvalidRequest
from mesh.observability.metrics import Metrics
from mesh.workers.carried_calls import CarriedCalls
from mesh.workers.judge import admit_carried

# Of the connection to the worker, or written again for the one to control.
_OF_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "expect", "x-request-id"})


class WorkerHttp:
    """`address`: `HOST:PORT`, which other workers listen at, too. `web_policy`: the rules of Host for callers without keys."""

    def __init__(
        self,
        address: str,
        calls: CarriedCalls,
        connections: Connections,
        keys: KeyTable,
        *,
        tls: TlsIdentity | None,
        limits: ConnectionLimits,
        memory: RequestMemory,
        max_body_bytes: int,
        web_policy: WebPolicy | None,
        grace_s: float,
    ) -> None:
        self._address = address
        self._calls = calls
        self._connections = connections
        self._keys = keys
        self._tls = tls
        self._memory = memory
        self._max_body_bytes = max_body_bytes
        self._web_policy = web_policy
        # Control counts the requests that a worker carries from its figures, so nothing reads these metrics.
        self._listeners = HttpListeners(limits, (request_log(Metrics()), errors_as_json), grace_s=grace_s)
        router = self._listeners.app.router
        for path in MODEL_IN_BODY_PATHS:
            router.add_post(path, self._post)
        router.add_route("*", "/{path:.*}", self._pass_on)

    async def start(self) -> None:
        """Raises OSError if the address cannot be listened on."""
        context = self._tls.server_context() if self._tls is not None else None
        await self._listeners.listen(self._address, context, is_shared=True)

    async def stop(self) -> None:
        """Refuse new connections; running responses may end within the grace period."""
        await self._listeners.stop()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        if not self._may_be_read(request):
            return await self._pass_on(request)
        record = Record.of(request)
        record.memory = self._memory.hold()
        body = await read_body(request, self._max_body_bytes, record.memory)
        return await self._forward(request, body, self._carried_name(request, body))

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = request.content.iter_any() if request.body_exists else None
        return await self._forward(request, body, "")

    async def _forward(
        self, request: web.Request, body: bytes | AsyncIterator[bytes] | None, name: str
    ) -> web.StreamResponse:
        """Send the request to the copy of a model's name, to control if that refuses it or the name is empty, and answer with the response."""
        record = Record.of(request)
        record.name = name
        caller = current_caller().name if name else ""
        headers = _headers(request, record.request_id)
        forwarded = HttpRequest(request.method, target_of(request), headers, body, name, caller, record.started_s)
        with (
            self._calls.attempts(Carrier.HTTP, name) as attempts,
            HttpForwarder(self._connections, lambda: (), forwarded) as forwarder,
        ):
            record.model_id = attempts.model_id
            async for attempt in attempts:
                await forwarder.forward(attempt)
                if attempt.target.is_control:
                    attempt.failure = None  # its refusals are for the caller
            forwarder.raise_if_unanswered()
            record.first_s = record.elapsed_s
            record.is_logged = forwarder.is_logged
            try:
                return await relay(request, record, forwarder, None, name)
            finally:
                if caller and forwarder.local_since_s is not None:
                    self._calls.count_key(caller, Carrier.HTTP, record.code)

    def _may_be_read(self, request: web.Request) -> bool:
        """Return whether a request could be carried, as far as its headers show, so that its body is worth reading."""
        if (
            any(name in request.headers for name in HTTP_EXCEPTIONS)
            or (request.content_length or 0) > self._max_body_bytes
        ):
            return False
        if self._keys.is_required:
            return self._keys.find_first(http_secrets(request)) is not None
        return self._web_policy is None or not self._web_policy.refusal(request.method, request.headers)

    def _carried_name(self, request: web.Request, body: bytes) -> str:
        """Return the model's name if the request may be carried, and set its caller; else an empty text."""
        try:
            asked = decode(body, InferenceBody)
        except InvalidRequest:
            return ""
        if any(getattr(asked, name) for name in AdapterFields.__struct_fields__):
            return ""
        name = asked.model
        if not name or not self._calls.carries(Carrier.HTTP, name):
            return ""
        return name if admit_carried(self._keys, http_secrets(request), name) else ""


def _headers(request: web.Request, request_id: str) -> Headers:
    """Return the headers for control, which reads them as if the request had come to it first."""
    headers = [(key, value) for key, value in request.headers.items() if key.lower() not in _OF_CONNECTION]
    headers.append(("X-Request-Id", request_id))
    return headers
