"""Logs one line per inference call over gRPC when it has ended, with the same fields as `request_log` for HTTP."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from common.log_headers import LOGGED_HEADER, NAME_HEADER
from runtime.api.grpc_errors import AnyContext
from runtime.api.request_log import REQUEST_ID_HEADER, log_end, request_id_of
from runtime.observability.request_record import RequestRecord

_POLLS = frozenset({"ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfo"})

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class GrpcRequestLog(grpc.aio.ServerInterceptor):
    """Logs the calls of services, given by their full names. A mesh learns from a trailer that the call is logged here."""

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(self._prefixes):
            return handler
        return _logging(method, handler)


def _logging(method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler of a method with one request, logging the end of each call."""
    serializers = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }

    async def answer(request: Any, context: AnyContext) -> Any:
        with _logged(method, context):
            return await handler.unary_unary(request, context)

    async def stream(request: Any, context: AnyContext) -> AsyncIterator[Any]:
        with _logged(method, context):
            async for message in handler.unary_stream(request, context):
                yield message

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(answer, **serializers)
    return grpc.unary_stream_rpc_method_handler(stream, **serializers)


@contextmanager
def _logged(method: str, context: AnyContext) -> Iterator[None]:
    """Record the call that is answered inside and log its end, which is CANCELLED if neither an answer nor a status ended it."""
    sent = {key: value if isinstance(value, str) else "" for key, value in context.invocation_metadata() or ()}
    if NAME_HEADER in sent:
        context.set_trailing_metadata(((LOGGED_HEADER, "1"),))
    record = RequestRecord.begin()
    code = grpc.StatusCode.CANCELLED.name
    try:
        yield
        code = grpc.StatusCode.OK.name
    except grpc.aio.AbortError:
        code = context.code().name
        raise
    finally:
        log_end(
            record,
            code,
            method="gRPC",
            path=method,
            request_id=request_id_of(sent.get(REQUEST_ID_HEADER.lower(), "")),
            header=lambda name: sent.get(name, ""),
            is_poll=method.rpartition("/")[2] in _POLLS and code != grpc.StatusCode.INTERNAL.name,
        )
