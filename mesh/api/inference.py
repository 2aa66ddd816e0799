"""Inference over gRPC: any method, unary or streaming in either direction, passed on as opaque bytes to a copy of the model it names.

Knows addressing and routing; of a message at most the field that holds the model's name. A request that was not answered yet is sent again
once: to another copy if its target is away, to a fresh load if its target no longer has the model.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from mesh.api.addressing import PREFIX_HEADER, Addressing, Metadata, backward, header, onward
from mesh.api.known_methods import single_message_methods
from mesh.api.protobuf_field import inject
from mesh.api.replay_buffer import ReplayBuffer, ServerContext
from mesh.client.connections import HOP_HEADER, Connections
from mesh.errors import InvalidRequest, MeshError, NotFound, NotSupported
from mesh.metrics import Metrics
from mesh.registry.registry import Registry
from mesh.routing.router import CopyRouter
from mesh.types import RuntimeLimits, Target

logger = logging.getLogger(__name__)

_REQUEST_ID = "x-request-id"
# grpc.aio's words when a call ended while a message was being written to it: the status that it ended with is lost, so it is asked for again
_MASKED = "Internal error from Core"
_MASKED_RETRIES = 3


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one attempt ended. `begun`: the caller has already got a part of the answer."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]
    begun: bool


@dataclass(slots=True)
class _Request:
    method: str
    metadata: Metadata
    started_s: float
    request_id: str
    model_id: str = ""
    code: str = "OK"


class InferenceGateway(grpc.GenericRpcHandler):
    """The handler of last resort: whatever service the mesh itself doesn't have. `limits`: the runtime's, once they are known."""

    def __init__(
        self,
        registry: Registry,
        router: CopyRouter,
        connections: Connections,
        addressing: Addressing,
        metrics: Metrics,
        *,
        own_id: str,
        limits: Callable[[], RuntimeLimits | None],
        max_message_bytes: int,
    ) -> None:
        self._registry = registry
        self._router = router
        self._connections = connections
        self._addressing = addressing
        self._metrics = metrics
        self._own_id = own_id
        self._limits = limits
        self._max_message_bytes = max_message_bytes
        self._single_message = single_message_methods()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = handler_call_details.method.lstrip("/")

        async def serve(_: AsyncIterator[bytes], context: ServerContext) -> None:
            await self._serve(method, None, context)

        async def serve_one(message: bytes, context: ServerContext) -> None:
            await self._serve(method, message, context)

        single = method in self._single_message
        handler: grpc.RpcMethodHandler[bytes, bytes] = (
            grpc.unary_stream_rpc_method_handler(serve_one) if single else grpc.stream_stream_rpc_method_handler(serve)
        )
        return handler

    async def _serve(self, method: str, message: bytes | None, context: ServerContext) -> None:
        """`message`: the caller's only one; None: there may be any number to read."""
        metadata = tuple(context.invocation_metadata() or ())
        request = _Request(method, metadata, time.monotonic(), header(metadata, _REQUEST_ID) or uuid.uuid4().hex)
        inbound = ReplayBuffer(context, 2 * self._max_message_bytes, only=message)
        try:
            outcome = await self._answer(request, inbound, context)
            request.code = outcome.code.name
            if outcome.code is not grpc.StatusCode.OK:
                await context.abort(outcome.code, outcome.details, outcome.trailers)
            context.set_trailing_metadata(outcome.trailers)
        except MeshError as error:
            request.code = error.code
            trailers = (("retry-after", str(round(error.retry_after_s))),) if error.retry_after_s is not None else ()
            await context.abort(grpc.StatusCode[error.code], error.message, trailers)
        except asyncio.CancelledError:
            request.code = "CANCELLED"
            raise
        finally:
            inbound.close()
            self._account(request)

    async def _answer(self, request: _Request, inbound: ReplayBuffer, context: ServerContext) -> _Outcome:
        self._check_allowed(request.method)
        first = await inbound.message(0) if self._addressing.wants_message(request.method, request.metadata) else None
        here = bool(header(request.metadata, HOP_HEADER))
        address = self._addressing.address(request.method, request.metadata, first)
        request.model_id = await self._registry.resolve_known(address.name, virtual=address.virtual)
        exclude: frozenset[str] = frozenset()
        retried = reloaded = moved = False
        masked = 0
        while True:
            try:
                target = await self._router.route(
                    request.model_id,
                    deadline_s=context.time_remaining(),
                    prefix_hash=header(request.metadata, PREFIX_HEADER),
                    exclude=exclude,
                    here=here,
                )
            except NotFound:
                # the name has moved to another model between its resolution and now
                successor = None if moved else await self._registry.successor(address.name, request.model_id)
                if successor is None:
                    raise
                request.model_id, moved, reloaded = successor, True, False
                continue
            try:
                outcome = await self._attempt(request, target, inbound, context)
            finally:
                self._router.end(request.model_id, target)
            if outcome.begun or not inbound.replayable:
                return outcome
            if outcome.code is grpc.StatusCode.INTERNAL and outcome.details == _MASKED and masked < _MASKED_RETRIES:
                masked += 1
            elif says_gone(outcome.code, outcome.details) and not reloaded:
                reloaded = True
                self._router.forget(request.model_id, target)
            elif outcome.code is grpc.StatusCode.UNAVAILABLE and not retried and not here:
                retried = True
                exclude = frozenset({target.instance_id})
            else:
                return outcome

    async def _attempt(
        self, request: _Request, target: Target, inbound: ReplayBuffer, context: ServerContext
    ) -> _Outcome:
        metadata = onward(request.metadata, request.model_id, hop_from="" if target.local else self._own_id)
        if not header(metadata, _REQUEST_ID):
            metadata.append((_REQUEST_ID, request.request_id))
        channel = self._connections.grpc(target.grpc_address, of_pod=not target.local)
        timeout_s = context.time_remaining()
        rewrite = self._rewrite(request, target)
        call: grpc.aio.UnaryStreamCall[bytes, bytes] | grpc.aio.StreamStreamCall[bytes, bytes]
        sending: asyncio.Task[None] | None = None
        if inbound.only is not None:
            single: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{request.method}")
            call = single(rewrite(inbound.only) if rewrite else inbound.only, metadata=metadata, timeout=timeout_s)
        else:
            stub: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{request.method}")
            call = streaming = stub(metadata=metadata, timeout=timeout_s)
            sending = asyncio.create_task(self._send(streaming, inbound, rewrite))
            # what can't be sent is never answered either
            sending.add_done_callback(lambda task: streaming.cancel() if _error_of(task) else None)
        begun = False
        try:
            with _ended_is_no_error():
                while (message := await call.read()) is not grpc.aio.EOF:
                    if not begun:
                        begun = True
                        inbound.commit()
                        self._metrics.first_byte(request.model_id, time.monotonic() - request.started_s)
                        await self._send_headers(call, context)
                    await context.write(message)
            code = await call.code()
            if sending is not None and (error := _error_of(sending)) is not None:
                raise error
            if code is grpc.StatusCode.OK and not begun:
                begun = True
                await self._send_headers(call, context)
            return _Outcome(
                code, await call.details() or "", tuple(backward(tuple(await call.trailing_metadata() or ()))), begun
            )
        finally:
            if sending is not None:
                sending.cancel()
            call.cancel()

    async def _send_headers(self, call: grpc.aio.Call, context: ServerContext) -> None:
        # without any of the runtime's own they leave with the first message, in one write
        if headers := backward(tuple(await call.initial_metadata())):
            await context.send_initial_metadata(headers)

    async def _send(
        self,
        call: grpc.aio.StreamStreamCall[bytes, bytes],
        inbound: ReplayBuffer,
        rewrite: Callable[[bytes], bytes] | None,
    ) -> None:
        index = 0
        # a call that has ended takes no more; its reader learns why. InternalError, raised on, would leave the caller without any status
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            while (message := await inbound.message(index)) is not None:
                await call.write(rewrite(message) if rewrite else message)
                index += 1
            await call.done_writing()

    def _rewrite(self, request: _Request, target: Target) -> Callable[[bytes], bytes] | None:
        """What the runtime wants done to each message: the concrete id written into it."""
        limits = self._limits()
        path = limits.allowed_methods.get(request.method) if limits else None
        if not path or not target.local:
            return None
        model_id, injection_path = request.model_id, path

        def rewrite(message: bytes) -> bytes:
            try:
                return inject(message, injection_path, model_id)
            except ValueError as error:
                raise InvalidRequest(f"{request.method}: the request message can't be read: {error}") from None

        return rewrite

    def _check_allowed(self, method: str) -> None:
        self._addressing.check_allowed(method)
        limits = self._limits()
        if limits is not None and not limits.allow_any_method and method not in limits.allowed_methods:
            raise NotSupported(f"Method not found or not permitted: {method}")

    def _account(self, request: _Request) -> None:
        seconds = time.monotonic() - request.started_s
        # a label is for methods that there are, not for whatever callers make up
        exists = request.code == "OK" or request.method in self._single_message
        self._metrics.request(
            request.model_id, "grpc", request.code, request.method.rpartition("/")[2] if exists else "other", seconds
        )
        logger.info(
            "request",
            extra={
                "request_id": request.request_id,
                "carrier": "grpc",
                "method": request.method,
                "model": request.model_id,
                "code": request.code,
                "seconds": round(seconds, 4),
            },
        )


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


@contextlib.contextmanager
def _ended_is_no_error() -> Iterator[None]:
    """A call's bad end is told by its status. One that ended as CANCELLED raises as if this task were cancelled, and it isn't."""
    try:
        yield
    except grpc.aio.AioRpcError:
        pass
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise


def says_gone(code: grpc.StatusCode, details: str) -> bool:
    """Whether a runtime's status means that it no longer has the model: NOT_FOUND, or what two known servers say instead."""
    if code is grpc.StatusCode.NOT_FOUND:
        return True
    if code is grpc.StatusCode.UNAVAILABLE:
        return details.startswith("Request for unknown model") and details.endswith(
            (" is not found", " has no available versions")
        )
    return code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith("Model ") and details.endswith(" not found")


def refuse(error: MeshError) -> Callable[[AsyncIterator[bytes], ServerContext], Awaitable[None]]:
    """A handler that answers every request with this error."""

    async def serve(_: AsyncIterator[bytes], context: ServerContext) -> None:
        await context.abort(grpc.StatusCode[error.code], error.message)

    return serve
