"""Forwards inference over gRPC by model name: any method that the mesh does not serve itself."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import time
from collections.abc import Callable

import grpc
import grpc.aio
from msgspec.structs import replace

from mesh.access.caller import current_caller
from mesh.access.peer_keys import PeerKeys
from mesh.api.adapter_choice import AdapterChooser
from mesh.api.addressing import PREFIX_HEADER, REQUIRED_HEADER, Address, Addressing
from mesh.api.grpc_calls import GrpcCalls
from mesh.api.grpc_forwarder import (
    ForwardingContext,
    GrpcForwarder,
    GrpcOutcome,
    GrpcRequest,
)
from mesh.api.merged_part import MergedPart
from mesh.api.replay_buffer import ReplayBuffer, ServerContext
from mesh.api.request_memory import RequestMemory
from mesh.client.connections import Connections
from mesh.errors import NotFound, NotSupported
from mesh.observability.metrics import Metrics
from mesh.registry.registry import Registry
from mesh.routing.attempts import RoutingRequest
from mesh.routing.router import CopyRouter
from mesh.types import RuntimeLimits

_OK = grpc.StatusCode.OK


class InferenceGateway:
    """Handles every method that no other handler of the server takes. `limits`: the local runtime's limits, once they are known.

    `calls` makes the handlers. `behind_worker`: as in GrpcCalls.
    """

    def __init__(
        self,
        registry: Registry,
        router: CopyRouter,
        connections: Connections,
        addressing: Addressing,
        adapters: AdapterChooser,
        metrics: Metrics,
        *,
        peers: PeerKeys,
        limits: Callable[[], RuntimeLimits | None],
        max_message_bytes: int,
        memory: RequestMemory,
        behind_worker: bool = False,
    ) -> None:
        self._registry = registry
        self._router = router
        self._addressing = addressing
        self._adapters = adapters
        self._metrics = metrics
        self._limits = limits
        self._forwarder = GrpcForwarder(connections, metrics, peers.headers, limits)
        self._max_message_bytes = max_message_bytes
        self._memory = memory
        self.calls = GrpcCalls(
            self._answer, self._record, memory, max_message_bytes=max_message_bytes, behind_worker=behind_worker
        )

    async def _answer(self, request: GrpcRequest, inbound: ReplayBuffer, context: ServerContext) -> GrpcOutcome:
        self._check_allowed(request.method)
        first = inbound.only
        if first is None and self._addressing.wants_message(request.method, request.metadata):
            first = await inbound.message(0)
        addresses = self._addressing.addresses(request.method, request.metadata, first)
        if len(addresses) > 1:
            return await self._answer_several(request, addresses, inbound, context)
        [address] = addresses
        name = await self._adapters.choose(
            address.name, lambda: self._addressing.adapter(request.method, first), virtual=address.virtual
        )
        if name is not None and name != address.name:
            address = Address(name, virtual=False)
        return await self._answer_one(request, address, inbound, context)

    async def _answer_one(
        self, request: GrpcRequest, address: Address, inbound: ReplayBuffer, context: ForwardingContext
    ) -> GrpcOutcome:
        request.name = address.name
        request.model_id = await self._registry.resolve_known(address.name, virtual=address.virtual)
        routing = RoutingRequest(
            address.name,
            request.model_id,
            prefix_hash=request.metadata.first(PREFIX_HEADER),
            local_only=current_caller().is_peer,
            time_left_s=context.time_remaining,
        )
        with self._router.attempts(routing) as attempts:
            try:
                async for attempt in attempts:
                    if request.is_unary and inbound.only is not None:
                        outcome = await self._forwarder.forward_unary(request, attempt, inbound.only, context)
                    else:
                        outcome = await self._forwarder.forward(request, attempt, inbound, context)
            finally:
                request.model_id = attempts.model_id
        return outcome

    async def _answer_several(
        self, request: GrpcRequest, addresses: tuple[Address, ...], inbound: ReplayBuffer, context: ServerContext
    ) -> GrpcOutcome:
        """Send one message to several models and answer with their responses joined, which merges protobuf messages, as ModelMesh does."""
        message = await inbound.message(0) or b""
        parts = [MergedPart(context) for _ in addresses]

        async def call(address: Address, part: MergedPart) -> GrpcOutcome | NotFound:
            one = GrpcRequest(
                request.method,
                request.metadata,
                request.started_s,
                request.request_id,
                is_unary=request.is_unary,
                invocations=request.invocations,
            )
            replay = ReplayBuffer(context, self._memory.hold(), 2 * self._max_message_bytes, only=message)
            try:
                replay.admit()
                outcome = await self._answer_one(one, address, replay, part)
                part.body += outcome.message
                return outcome
            except NotFound as error:
                return error
            finally:
                replay.close()

        outcomes = await asyncio.gather(*(call(*pair) for pair in zip(addresses, parts, strict=True)))
        missing = [outcome for outcome in outcomes if isinstance(outcome, NotFound)]
        found = [outcome for outcome in outcomes if not isinstance(outcome, NotFound)]
        if missing and request.metadata.first(REQUIRED_HEADER).lower() == "all":
            raise missing[0]
        if not found:
            raise NotFound("none of the requested models were found")
        failed = next((outcome for outcome in found if outcome.code is not _OK), None)
        if failed is not None:
            return failed
        merged = b"".join(part.body for part in parts)
        request.response_bytes = len(merged)
        if not request.is_unary:
            await context.write(merged)
        return replace(found[0], message=merged)

    def _check_allowed(self, method: str) -> None:
        self._addressing.check_allowed(method)
        limits = self._limits()
        if limits is not None and not limits.allow_any_method and method not in limits.allowed_methods:
            raise NotSupported(f"Method not found or not permitted: {method}")

    def _record(self, request: GrpcRequest, request_bytes: int) -> None:
        seconds = time.monotonic() - request.started_s
        # Only known methods become labels, to bound their number.
        is_known = request.code == "OK" or self.calls.is_known(request.method)
        label = request.method.rpartition("/")[2] if is_known else "other"
        self._metrics.request(
            request.model_id,
            "grpc",
            request.code,
            label,
            seconds,
            key=current_caller().name,
            request_bytes=request_bytes,
            response_bytes=request.response_bytes,
        )
        for code, invoke_s in request.invocations:
            self._metrics.invoked(label, code, invoke_s)
