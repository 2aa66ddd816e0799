"""Refuses a mesh's own methods to the callers of models.

A mesh forwards any method that its callers name, with the model's id in the metadata. Its own calls carry no such id.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from runtime.api.model_lookup import MODEL_ID_HEADER

_REMOTE = (
    "this method is for the mesh beside this runtime, and the call comes from another machine; start the runtime with --remote-mesh "
    "to allow that"
)
_MODEL_ID_HEADERS = (MODEL_ID_HEADER, f"{MODEL_ID_HEADER}-bin")

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class MeshOnly(grpc.aio.ServerInterceptor):
    """Answers UNIMPLEMENTED to a forwarded call of one of `services`, given by their full names.

    Without `allow_remote`, callers of other machines get PERMISSION_DENIED: a mesh runs beside its runtime.
    """

    def __init__(self, *services: str, allow_remote: bool = False) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._allow_remote = allow_remote

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not handler_call_details.method.startswith(self._prefixes):
            return await continuation(handler_call_details)
        if any(key in _MODEL_ID_HEADERS for key, _ in handler_call_details.invocation_metadata or ()):
            return _REFUSAL
        handler = await continuation(handler_call_details)
        return handler if handler is None or self._allow_remote else _for_this_machine(handler)


def is_of_this_machine(peer: str) -> bool:
    """Return whether gRPC's name of a caller, such as `ipv4:127.0.0.1:5000` or `unix:`, is that of a process of this machine."""
    kind, _, address = peer.partition(":")
    if kind == "unix":
        return True
    host = unquote(address.rpartition(":")[0]).strip("[]")
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _for_this_machine(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler of a method with one request, checking where each call comes from."""
    serializers = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }

    async def check(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not is_of_this_machine(context.peer()):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, _REMOTE)

    if handler.unary_unary is not None:
        serve_one = handler.unary_unary

        async def answer(request: Any, context: Any) -> Any:
            await check(context)
            return await serve_one(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, **serializers)
    serve_stream: Any = handler.unary_stream

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await check(context)
        async for message in serve_stream(request, context):
            yield message

    return grpc.unary_stream_rpc_method_handler(stream, **serializers)


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this method is for the mesh and cannot be called for a model")


_REFUSAL: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse)
