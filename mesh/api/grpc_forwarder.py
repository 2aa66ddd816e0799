"""Carries one gRPC call to one target: any method, unary or streaming in either direction, as opaque bytes."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import grpc
import grpc.aio
import msgspec

from common.log_headers import CALLER_HEADER, LOGGED_HEADER, NAME_HEADER, WAITED_HEADER
from mesh.access.caller import current_caller
from mesh.api.addressing import REQUEST_ID_HEADER, backward, onward, unread
from mesh.api.call_metadata import CallMetadata, Metadata
from mesh.api.protobuf_field import inject
from mesh.api.replay_buffer import ReplayBuffer
from mesh.api.started_write import StartedWrite
from mesh.client.connections import Connections
from mesh.client.stubbed_channel import StubbedChannel
from mesh.errors import InvalidRequest
from mesh.observability.metrics import Metrics
from mesh.routing.attempts import Attempt
from mesh.routing.retry_policy import Failure
from mesh.types import RuntimeLimits, Target

_MIN_WAIT_S = 0.001
_OK = grpc.StatusCode.OK
_LOST_STATUS = "Internal error from Core"

_quoted = functools.lru_cache(maxsize=4096)(quote)  # callers repeat few names

Rewrite = Callable[[bytes], bytes]
ForwardedCall = grpc.aio.UnaryStreamCall[bytes, bytes] | grpc.aio.StreamStreamCall[bytes, bytes]


class ForwardingContext(Protocol):
    """What forwarding needs of the caller's context."""

    def time_remaining(self) -> float | None: ...

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None: ...

    def write(self, message: bytes) -> Coroutine[Any, Any, None]: ...


class GrpcRequest(msgspec.Struct):
    """One call of a client. `model_id` and the fields after it are filled in as they become known.

    `is_unary`: the method has one message each way. `invocations`: status code and duration in seconds of each call of the local runtime.
    """

    method: str
    metadata: CallMetadata
    started_s: float
    request_id: str
    is_unary: bool = False
    name: str = ""  # the model's name as the client wrote it
    model_id: str = ""
    code: str = "OK"
    first_s: float = 0.0  # until the first message of the response
    is_logged: bool = False  # by another process of this pod
    response_bytes: int = 0
    invocations: list[tuple[str, float]] = msgspec.field(default_factory=list)


class GrpcOutcome(msgspec.Struct, frozen=True):
    """The status that one attempt ended with. `message`: the response of a unary method."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]
    message: bytes = b""


class GrpcForwarder:
    """`peer_headers`: what a call to another pod carries. `limits`: the local runtime's limits, once they are known."""

    def __init__(
        self,
        connections: Connections,
        metrics: Metrics,
        peer_headers: Callable[[], Sequence[tuple[str, str]]],
        limits: Callable[[], RuntimeLimits | None],
    ) -> None:
        self._connections = connections
        self._metrics = metrics
        self._peer_headers = peer_headers
        self._limits = limits

    async def forward(
        self, request: GrpcRequest, attempt: Attempt, inbound: ReplayBuffer, context: ForwardingContext
    ) -> GrpcOutcome:
        """Forward the request and relay the response. Sets the attempt's `is_committed` and `failure`."""
        started_s = time.monotonic()
        call, sending = self._start(request, attempt, inbound, context.time_remaining())
        attempt.cancel_when_lost(call.cancel)
        try:
            await self._relay(request, attempt, call, inbound, context)
            code = await call.code()
            if attempt.is_lost and code is grpc.StatusCode.CANCELLED:
                attempt.is_committed = attempt.is_committed or not inbound.replayable
                return _lost(attempt)
            if attempt.target.local:
                request.invocations.append((code.name, time.monotonic() - started_s))
            if sending is not None and (error := _error_of(sending)) is not None:
                raise error
            if code is grpc.StatusCode.OK and not attempt.is_committed:
                attempt.begin_response()
                await _send_headers(call, context)
            details = await call.details() or ""
            attempt.failure = _failure_of(code, details)
            attempt.is_committed = attempt.is_committed or not inbound.replayable
            trailers = _trailers(request, attempt, await call.trailing_metadata())
            return GrpcOutcome(code, _details(request, attempt, code, details), trailers)
        finally:
            if sending is not None:
                sending.cancel()
            call.cancel()

    async def forward_unary(
        self, request: GrpcRequest, attempt: Attempt, message: bytes, context: ForwardingContext
    ) -> GrpcOutcome:
        """Forward a call with one message each way, for which gRPC needs one operation instead of six. The outcome has the response."""
        started_s = time.monotonic()
        target = attempt.target
        rewrite = self._rewrite(request.method, attempt)
        call = self._stubs(target).unary(request.method)(
            rewrite(message) if rewrite else message,
            metadata=self._metadata(request, attempt),
            timeout=context.time_remaining(),
        )
        attempt.cancel_when_lost(call.cancel)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            if target.local:
                request.invocations.append((error.code().name, time.monotonic() - started_s))
            code, details = error.code(), error.details() or ""
            attempt.failure = _failure_of(code, details)
            trailers = _trailers(request, attempt, error.trailing_metadata())
            return GrpcOutcome(code, _details(request, attempt, code, details), trailers)
        except asyncio.CancelledError:
            if not attempt.is_lost or _is_cancelling():
                raise
            return _lost(attempt)
        now_s = time.monotonic()
        if target.local:
            request.invocations.append(("OK", now_s - started_s))
        attempt.begin_response()
        request.first_s = now_s - request.started_s
        self._metrics.first_byte(attempt.model_id, request.first_s)
        request.response_bytes += len(response)
        await _send_headers(call, context)
        trailers = _trailers(request, attempt, await call.trailing_metadata())
        return GrpcOutcome(_OK, "", trailers, response)

    async def _relay(
        self,
        request: GrpcRequest,
        attempt: Attempt,
        call: ForwardedCall,
        inbound: ReplayBuffer,
        context: ForwardingContext,
    ) -> None:
        """Relay messages until the call has ended. One is written while the next is read."""
        messages = aiter(call)
        first: bytes | None = None
        with _status_not_exception():
            first = await anext(messages, None)
        if first is None:
            return
        attempt.begin_response()
        inbound.commit()
        request.first_s = time.monotonic() - request.started_s
        self._metrics.first_byte(attempt.model_id, request.first_s)
        await _send_headers(call, context)
        request.response_bytes += len(first)
        writing = StartedWrite(context.write(first))
        try:
            with _status_not_exception():
                async for message in messages:
                    await writing
                    request.response_bytes += len(message)
                    writing = StartedWrite(context.write(message))
            await writing
        finally:
            writing.close()

    def _start(
        self, request: GrpcRequest, attempt: Attempt, inbound: ReplayBuffer, timeout_s: float | None
    ) -> tuple[ForwardedCall, asyncio.Task[None] | None]:
        """Open the call, and a task that sends the caller's messages unless the only one is known already."""
        metadata, stubs = self._metadata(request, attempt), self._stubs(attempt.target)
        rewrite = self._rewrite(request.method, attempt)
        if inbound.only is not None:
            message = rewrite(inbound.only) if rewrite else inbound.only
            return stubs.streaming(request.method)(message, metadata=metadata, timeout=timeout_s), None
        stub: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = stubs.channel.stream_stream(f"/{request.method}")
        call = stub(metadata=metadata, timeout=timeout_s)
        sending = asyncio.create_task(_send(call, inbound, rewrite))
        # A request that cannot be sent gets no response.
        sending.add_done_callback(lambda task: call.cancel() if _error_of(task) else None)
        return call, sending

    def _stubs(self, target: Target) -> StubbedChannel:
        return self._connections.stubs(target.grpc_address, of_pod=target.is_peer)

    def _metadata(self, request: GrpcRequest, attempt: Attempt) -> list[tuple[str, str | bytes]]:
        if attempt.target.is_control:
            return [*unread(request.metadata.pairs), (REQUEST_ID_HEADER, request.request_id)]
        peer_headers = () if attempt.target.local else self._peer_headers()
        metadata = onward(request.metadata.pairs, attempt.model_id, peer_headers=peer_headers)
        metadata.append((REQUEST_ID_HEADER, request.request_id))
        if attempt.target.local:
            metadata.append((NAME_HEADER, _quoted(request.name)))
            # Each header costs a few microseconds per call, so headers that carry no information are left out.
            if caller := current_caller().name:
                metadata.append((CALLER_HEADER, quote(caller)))
            if (waited_s := time.monotonic() - request.started_s) >= _MIN_WAIT_S:
                metadata.append((WAITED_HEADER, f"{waited_s:.3f}"))
        return metadata

    def _rewrite(self, method: str, attempt: Attempt) -> Rewrite | None:
        """Return what writes the concrete id into each message, if the local runtime requires it for this method."""
        limits = self._limits()
        path = limits.allowed_methods.get(method) if limits else None
        if not path or not attempt.target.local:
            return None
        model_id, injection_path = attempt.model_id, path

        def rewrite(message: bytes) -> bytes:
            try:
                return inject(message, injection_path, model_id)
            except ValueError as error:
                raise InvalidRequest(f"{method}: the request message cannot be read: {error}") from None

        return rewrite


def _trailers(
    request: GrpcRequest, attempt: Attempt, trailers: Iterable[tuple[str, str | bytes]] | None
) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailers for the caller, and note whether another process of this pod logs the call: its runtime says so in them."""
    received = tuple(trailers or ())
    target = attempt.target
    request.is_logged = target.is_control or (target.local and any(key == LOGGED_HEADER for key, _ in received))
    return backward(received)


async def _send_headers(call: grpc.aio.Call, context: ForwardingContext) -> None:
    # If the runtime sends no headers of its own, they leave with the first message in one write.
    if headers := backward(tuple(await call.initial_metadata())):
        await context.send_initial_metadata(headers)


async def _send(call: grpc.aio.StreamStreamCall[bytes, bytes], inbound: ReplayBuffer, rewrite: Rewrite | None) -> None:
    """Send the caller's messages until the call ends."""
    index = 0
    # A call that has ended raises one of these, and its reader has the status. Raising here would leave the caller without it.
    with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
        while (message := await inbound.message(index)) is not None:
            await call.write(rewrite(message) if rewrite else message)
            index += 1
        await call.done_writing()


def _has_lost_status(code: grpc.StatusCode, details: str) -> bool:
    """Return whether grpc.aio replaced the call's status, because the target ended the call before a message was sent. Only the text says so."""
    return code is grpc.StatusCode.INTERNAL and details == _LOST_STATUS


def _failure_of(code: grpc.StatusCode, details: str) -> Failure | None:
    if is_model_lost(code, details):
        return Failure.MODEL_LOST
    if _has_lost_status(code, details):
        return Failure.STATUS_LOST
    return Failure.UNAVAILABLE if code is grpc.StatusCode.UNAVAILABLE else None


def _details(request: GrpcRequest, attempt: Attempt, code: grpc.StatusCode, details: str) -> str:
    """Return the text of a failure. Failures of the local runtime get ModelMesh's form; those of a peer have it already."""
    if code is grpc.StatusCode.OK or not attempt.target.local:
        return details
    return f"{request.method}: {code.name}: {details}"


def _lost(attempt: Attempt) -> GrpcOutcome:
    attempt.failure = Failure.UNAVAILABLE
    return GrpcOutcome(grpc.StatusCode.UNAVAILABLE, f"{attempt.target.instance_id} does not answer any more", ())


def is_model_lost(code: grpc.StatusCode, details: str) -> bool:
    """Whether a runtime's status means that it no longer has the model.

    That is NOT_FOUND. Triton (UNAVAILABLE) and MLServer (INVALID_ARGUMENT) say it in their texts only, as ModelMesh recognises them.
    """
    if code is grpc.StatusCode.NOT_FOUND:
        return True
    if code is grpc.StatusCode.UNAVAILABLE:
        return details.startswith("Request for unknown model") and details.endswith(
            (" is not found", " has no available versions")
        )
    return code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith("Model ") and details.endswith(" not found")


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


@contextlib.contextmanager
def _status_not_exception() -> Iterator[None]:
    """Suppress what a failed call raises: its status says it. A call that ended as CANCELLED raises as if this task were cancelled."""
    try:
        yield
    except grpc.aio.AioRpcError:
        pass
    except asyncio.CancelledError:
        if _is_cancelling():
            raise


def _is_cancelling() -> bool:
    """Whether this task is being cancelled, as when the caller disconnects."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
