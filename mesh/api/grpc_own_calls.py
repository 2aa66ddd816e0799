"""Serves the calls of the pod's own gRPC services: parses their messages and logs each call.

A message that cannot be parsed is answered with INVALID_ARGUMENT. gRPC itself answers UNKNOWN and logs a traceback.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mesh.api.addressing import REQUEST_ID_HEADER
from mesh.api.call_metadata import CallMetadata
from mesh.api.request_log import log_grpc_call, request_id_of

Context = grpc.aio.ServicerContext[Any, Any]

_NAMES = ("modelId", "vModelId", "name")
_FAULTS = ("INTERNAL", "UNAVAILABLE", "UNKNOWN")


def own_call(method: str, metadata: CallMetadata, handler: Any, *, is_read: bool) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that receives bytes, parses them for `handler`, and logs the end of the call, at debug for a read (`is_read`) without a fault."""
    call = _Call(method, metadata, handler, is_read=is_read)
    serialize = handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(call.unary, response_serializer=serialize)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(call.server_stream, response_serializer=serialize)
    if inspect.iscoroutinefunction(handler.stream_stream):
        return grpc.stream_stream_rpc_method_handler(call.raw_stream, response_serializer=serialize)
    return grpc.stream_stream_rpc_method_handler(call.both_stream, response_serializer=serialize)


class _Call:
    def __init__(self, method: str, metadata: CallMetadata, handler: Any, *, is_read: bool) -> None:
        self._method = method
        self._metadata = metadata
        self._handler = handler
        self._is_read = is_read
        self._name = ""
        self._parse: Callable[[bytes], Any] | None = handler.request_deserializer

    async def unary(self, message: bytes, context: Context) -> Any:
        with self._logged(context):
            return await self._handler.unary_unary(await self._parsed(message, context), context)

    async def server_stream(self, message: bytes, context: Context) -> None:
        with self._logged(context):
            await self._handler.unary_stream(await self._parsed(message, context), context)

    async def both_stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for message in messages:
                yield await self._parsed(message, context)

        with self._logged(context):
            async for answer in self._handler.stream_stream(requests(), context):
                yield answer

    async def raw_stream(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Serve by a handler that reads and writes by itself."""
        with self._logged(context):
            await self._handler.stream_stream(messages, context)

    async def _parsed(self, message: bytes, context: Context) -> Any:
        if self._parse is None:
            return message
        try:
            request = self._parse(message)
        except DecodeError as error:
            text = f"{self._method}: the request message cannot be read: {error}"
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        self._name = next((name for field in _NAMES if (name := getattr(request, field, ""))), "")
        return request

    @contextlib.contextmanager
    def _logged(self, context: Context) -> Iterator[None]:
        started_s = time.monotonic()
        code = "UNKNOWN"
        try:
            yield
            code = "OK"
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        finally:
            is_debug = self._is_read and code not in _FAULTS
            log_grpc_call(
                logging.DEBUG if is_debug else logging.INFO,
                code=code,
                method=self._method,
                asked=self._name,
                seconds=time.monotonic() - started_s,
                request_id=request_id_of(self._metadata.first(REQUEST_ID_HEADER)),
            )
