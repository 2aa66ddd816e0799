"""Answers INVALID_ARGUMENT to a call of the pod's own services whose message cannot be parsed. gRPC itself answers UNKNOWN and logs a traceback."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Parses the messages of methods that have a parser. Forwarded methods have none: their messages stay bytes."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        return _parsing(handler_call_details.method.lstrip("/"), handler)


def _parsing(method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that receives bytes and parses them itself."""

    async def parsed(message: bytes, context: Context) -> Any:
        try:
            return handler.request_deserializer(message)
        except DecodeError as error:
            text = f"{method}: the request message can't be read: {error}"
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)

    async def unary(message: bytes, context: Context) -> Any:
        return await handler.unary_unary(await parsed(message, context), context)

    async def server_stream(message: bytes, context: Context) -> None:
        await handler.unary_stream(await parsed(message, context), context)

    async def both_stream(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for message in messages:
                yield await parsed(message, context)

        async for answer in handler.stream_stream(requests(), context):
            yield answer

    serialize = handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=serialize)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(server_stream, response_serializer=serialize)
    return grpc.stream_stream_rpc_method_handler(both_stream, response_serializer=serialize)
