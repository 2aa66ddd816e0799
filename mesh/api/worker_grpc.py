"""Serves gRPC in a worker: sends calls for loaded models to this pod's runtime, and passes all others on to the control process unread."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from typing import Any

import grpc

from mesh.access.caller import current_caller
from mesh.access.guard import bearer_secret
from mesh.access.key_table import KeyTable
from mesh.access.peer_keys import PEER_KEY_HEADER
from mesh.access.tls import TlsIdentity
from mesh.api.addressing import REQUIRED_HEADER, Addressing
from mesh.api.call_metadata import CallMetadata
from mesh.api.grpc_calls import GrpcCalls
from mesh.api.grpc_forwarder import GrpcForwarder, GrpcOutcome, GrpcRequest
from mesh.api.grpc_listener import GrpcLimits, listen, make_server
from mesh.api.replay_buffer import ReplayBuffer, ServerContext
from mesh.api.request_memory import RequestMemory
from mesh.client.connections import Connections
from mesh.envoy.plan import Carrier
from mesh.envoy.routes import MESH_METHODS
from mesh.errors import InvalidRequest
from mesh.observability.metrics import Metrics
from mesh.routing.retry_policy import Failure
from mesh.workers.carried_calls import CarriedCalls
from mesh.workers.judge import admit_carried

_NOT_CARRIED = tuple(prefix.removeprefix("/") for prefix in MESH_METHODS)


class WorkerGrpc:
    """`address`: `HOST:PORT`, which other workers listen at, too."""

    def __init__(
        self,
        address: str,
        calls: CarriedCalls,
        connections: Connections,
        keys: KeyTable,
        *,
        tls: TlsIdentity | None,
        limits: GrpcLimits,
        memory: RequestMemory,
    ) -> None:
        self._address = address
        self._calls = calls
        self._keys = keys
        self._tls = tls
        self._addressing = Addressing("")  # names are carried only if no configuration says where messages hold them
        # Control counts the calls that a worker carries from its figures, so nothing reads these metrics.
        self._forwarder = GrpcForwarder(connections, Metrics(), lambda: (), lambda: None)
        handlers = _Handlers(GrpcCalls(self._answer, self._record, memory, max_message_bytes=limits.max_message_bytes))
        self._server = make_server(limits, limits.caller_options(), is_shared=True)
        self._server.add_generic_rpc_handlers((handlers,))

    async def start(self) -> None:
        """Raises OSError if the address cannot be listened on."""
        listen(self._server, self._address, self._tls)
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls; running ones may end within the grace period."""
        await self._server.stop(grace_s)

    async def _answer(self, request: GrpcRequest, inbound: ReplayBuffer, context: ServerContext) -> GrpcOutcome:
        request.name = self._carried_name(request, inbound.only)
        with self._calls.attempts(Carrier.GRPC, request.name) as attempts:
            async for attempt in attempts:
                request.model_id = "" if attempt.target.is_control else attempts.model_id
                if request.is_unary and inbound.only is not None:
                    outcome = await self._forwarder.forward_unary(request, attempt, inbound.only, context)
                else:
                    outcome = await self._forwarder.forward(request, attempt, inbound, context)
                if attempt.target.is_control and attempt.failure is not Failure.STATUS_LOST:
                    attempt.failure = None  # its refusals are for the caller
        return outcome

    def _carried_name(self, request: GrpcRequest, message: bytes | None) -> str:
        """Return the model's name if the call may be carried, and set its caller; else an empty text."""
        method, metadata = request.method, request.metadata
        if method.startswith(_NOT_CARRIED) or PEER_KEY_HEADER in metadata or REQUIRED_HEADER in metadata:
            return ""
        try:
            addresses = self._addressing.addresses(method, metadata, message)
            selects_adapter = self._addressing.adapter(method, message) is not None
            secret = bearer_secret(metadata.first("authorization"))
        except InvalidRequest:
            return ""
        [first, *further] = addresses
        if further or first.virtual or selects_adapter or not self._calls.carries(Carrier.GRPC, first.name):
            return ""
        return first.name if admit_carried(self._keys, (secret,), first.name) else ""

    def _record(self, request: GrpcRequest, _: int) -> None:
        if request.model_id and (key := current_caller().name):
            self._calls.count_key(key, Carrier.GRPC, request.code)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, calls: GrpcCalls) -> None:
        self._calls = calls

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        metadata = CallMetadata(tuple(handler_call_details.invocation_metadata or ()))
        return self._calls.handler(str(handler_call_details.method).removeprefix("/"), metadata)
