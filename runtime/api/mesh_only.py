"""Refuses a mesh's own methods to the callers of models.

A mesh forwards any method that its callers name, with the model's id in the metadata. Its own calls carry no such id.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from runtime.api.model_lookup import MODEL_ID_HEADER

_MODEL_ID_HEADERS = (MODEL_ID_HEADER, f"{MODEL_ID_HEADER}-bin")

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class MeshOnly(grpc.aio.ServerInterceptor):
    """Answers UNIMPLEMENTED to a forwarded call of one of `services`, given by their full names."""

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method.startswith(self._prefixes) and any(
            key in _MODEL_ID_HEADERS for key, _ in handler_call_details.invocation_metadata or ()
        ):
            return _REFUSAL
        return await continuation(handler_call_details)


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this method is for the mesh and cannot be called for a model")


_REFUSAL: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse)
