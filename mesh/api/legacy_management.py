"""Serves the older names of ModelMesh's management API: `addModel`, `deleteModel`, and the service com.ibm.watson.tas.proto.TasRuntime."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshServicer

_SERVICE = "/mmesh.ModelMesh/"
_LEGACY_SERVICE = "/com.ibm.watson.tas.proto.TasRuntime/"
_LEGACY_METHODS = {"addModel": "registerModel", "deleteModel": "unregisterModel"}
_SERVED_METHODS = frozenset({"registerModel", "unregisterModel", "getModelStatus", "ensureLoaded"})


class LegacyManagement(grpc.GenericRpcHandler):
    """Maps the older names to the methods of `management`."""

    def __init__(self, management: ModelMeshServicer) -> None:
        self._management = management

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        path = handler_call_details.method
        service, _, name = path.rpartition("/")
        if f"{service}/" == _LEGACY_SERVICE:
            method = _LEGACY_METHODS.get(name, name)
            return self._handler(method) if method in _SERVED_METHODS else _unimplemented(path)
        if f"{service}/" == _SERVICE and name in _LEGACY_METHODS:
            return self._handler(_LEGACY_METHODS[name])
        return None

    def _handler(self, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        descriptor = pb.DESCRIPTOR.services_by_name["ModelMesh"].methods_by_name[method]
        request = getattr(pb, descriptor.input_type.name)
        response = getattr(pb, descriptor.output_type.name)
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            getattr(self._management, method),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
        return handler


def _unimplemented(path: str) -> grpc.RpcMethodHandler[Any, Any]:
    async def serve(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"Method not found: {path.lstrip('/')}")

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(serve)
    return handler
