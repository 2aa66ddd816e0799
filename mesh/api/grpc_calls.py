"""Serves forwarded gRPC calls, unary and streaming: reads their messages, answers with the outcome, and releases what a call holds."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from common.not_here import NOT_HERE_HEADER
from mesh.access.caller import current_caller
from mesh.api.addressing import REQUEST_ID_HEADER
from mesh.api.call_metadata import CallMetadata
from mesh.api.grpc_forwarder import GrpcOutcome, GrpcRequest
from mesh.api.known_methods import single_message_methods, unary_methods
from mesh.api.replay_buffer import ReplayBuffer, ServerContext
from mesh.api.request_log import log_grpc_call, request_id_of
from mesh.api.request_memory import RequestMemory
from mesh.errors import MeshError, NotFound, Unavailable

_OK = grpc.StatusCode.OK
_FIRST_MESSAGE_S = 0.25  # how long a refusal waits for the message of a process that forwards the call

Answer = Callable[[GrpcRequest, ReplayBuffer, ServerContext], Awaitable[GrpcOutcome]]
"""Answers one call. Raises MeshError."""


class GrpcCalls:
    """Makes the handlers of calls, and logs each call at its end. `record` gets it, with the bytes that the caller has sent.

    `behind_worker`: other processes of this pod forward the calls.
    """

    def __init__(
        self,
        answer: Answer,
        record: Callable[[GrpcRequest, int], None],
        memory: RequestMemory,
        *,
        max_message_bytes: int,
        behind_worker: bool = False,
    ) -> None:
        self._answer = answer
        self._record = record
        self._memory = memory
        self._max_message_bytes = max_message_bytes
        self._behind_worker = behind_worker
        self._single_message = single_message_methods()
        self._unary = unary_methods()

    def is_known(self, method: str) -> bool:
        """Whether a method is one of those that `single_message_methods` lists."""
        return method in self._single_message

    def handler(self, method: str, metadata: CallMetadata) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of one call of a method, `package.Service/Method`."""
        is_unary = method in self._unary

        async def serve_unary(message: bytes, context: ServerContext) -> bytes:
            return await self._serve(self._request(method, metadata, is_unary=True), message, context)

        async def serve_one(message: bytes, context: ServerContext) -> None:
            await self._serve(self._request(method, metadata), message, context)

        async def serve(_: AsyncIterator[bytes], context: ServerContext) -> None:
            await self._serve(self._request(method, metadata), None, context)

        if is_unary:
            return grpc.unary_unary_rpc_method_handler(serve_unary)
        if method in self._single_message:
            return grpc.unary_stream_rpc_method_handler(serve_one)
        return grpc.stream_stream_rpc_method_handler(serve)

    def refusal(
        self, error: MeshError, method: str, metadata: CallMetadata
    ) -> Callable[[AsyncIterator[bytes], ServerContext], Awaitable[None]]:
        """Return a handler that answers the call with this error, and logs it."""

        async def serve(_: AsyncIterator[bytes], context: ServerContext) -> None:
            request_id = request_id_of(metadata.first(REQUEST_ID_HEADER))
            log_grpc_call(logging.INFO, code=error.code, method=method, request_id=request_id)
            if self._behind_worker:
                with contextlib.suppress(TimeoutError, grpc.aio.BaseError, asyncio.InvalidStateError):
                    async with asyncio.timeout(_FIRST_MESSAGE_S):
                        await context.read()
            await context.abort(grpc.StatusCode[error.code], error.message, _trailers(error))

        return serve

    def _request(self, method: str, metadata: CallMetadata, *, is_unary: bool = False) -> GrpcRequest:
        request_id = request_id_of(metadata.first(REQUEST_ID_HEADER))
        return GrpcRequest(method, metadata, time.monotonic(), request_id, is_unary)

    async def _serve(self, request: GrpcRequest, message: bytes | None, context: ServerContext) -> bytes:
        """Return the response of a unary method; the messages of any other one are written.

        `message`: the only one of a method that takes one message; None if the caller may send any number.
        """
        inbound = ReplayBuffer(context, self._memory.hold(), 2 * self._max_message_bytes, only=message)
        try:
            inbound.admit()
            outcome = await self._answer(request, inbound, context)
            if outcome.code is not _OK:
                request.code = outcome.code.name
                await context.abort(outcome.code, outcome.details, outcome.trailers)
            if outcome.trailers:
                context.set_trailing_metadata(outcome.trailers)
            return outcome.message
        except MeshError as error:
            request.code = error.code
            if current_caller().is_peer or self._behind_worker:
                await inbound.take_first(_FIRST_MESSAGE_S)
            return await context.abort(grpc.StatusCode[error.code], error.message, _trailers(error))
        except asyncio.CancelledError:
            request.code = "CANCELLED"
            raise
        finally:
            inbound.close()
            self._record(request, inbound.received_bytes)
            _log(request)


def _log(request: GrpcRequest) -> None:
    log_grpc_call(
        logging.DEBUG if request.is_logged else logging.INFO,
        code=request.code,
        method=request.method,
        asked=request.name,
        model_id=request.model_id,
        first_s=request.first_s,
        seconds=time.monotonic() - request.started_s,
        request_id=request.request_id,
    )


def _trailers(error: MeshError) -> tuple[tuple[str, str], ...]:
    trailers = []
    if error.retry_after_s is not None:
        trailers.append(("retry-after", str(max(1, round(error.retry_after_s)))))
    if current_caller().is_peer and isinstance(error, NotFound | Unavailable):
        trailers.append((NOT_HERE_HEADER, "1"))
    return tuple(trailers)
