"""Serves the Open Inference Protocol's server methods and ModelReady; its other methods are forwarded to a runtime.

Forwarding ModelReady would load the model, so a monitor would keep every model from being evicted.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from mesh.api.addressing import Addressing
from mesh.api.call_metadata import CallMetadata
from mesh.errors import MeshError, NotFound
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, ModelStatuses
from wire.inference import grpc_predict_v2_pb2 as pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_MODEL_READY = f"{SERVICE_NAME}/ModelReady"


class OipServer:
    """Each method's specification is its comment in proto/inference/grpc_predict_v2.proto."""

    def __init__(
        self,
        registry: Registry,
        states: ModelStatuses,
        addressing: Addressing,
        *,
        is_ready: Callable[[], bool],
        version: str,
    ) -> None:
        self._registry = registry
        self._states = states
        self._addressing = addressing
        self._is_ready = is_ready
        self._version = version

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {
            "ServerLive": (self._live, pb.ServerLiveRequest),
            "ServerReady": (self._ready, pb.ServerReadyRequest),
            "ServerMetadata": (self._metadata, pb.ServerMetadataRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME, {name: _unary(serve, request) for name, (serve, request) in methods.items()}
        )

    async def _live(self, _: pb.ServerLiveRequest, __: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, _: pb.ServerReadyRequest, __: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def _metadata(self, _: pb.ServerMetadataRequest, __: object) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="repertory", version=self._version)

    async def _model_ready(
        self,
        request: pb.ModelReadyRequest,
        context: grpc.aio.ServicerContext[pb.ModelReadyRequest, pb.ModelReadyResponse],
    ) -> pb.ModelReadyResponse:
        metadata = CallMetadata(tuple(context.invocation_metadata() or ()))
        try:
            self._addressing.check_allowed(_MODEL_READY)
            address = self._addressing.addresses(_MODEL_READY, metadata, request.SerializeToString())[0]
            model_id = await self._registry.resolve_known(address.name, virtual=address.virtual)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        except MeshError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)
        return pb.ModelReadyResponse(ready=self._states.status(model_id).status is not ModelStatus.LOADING_FAILED)


def _unary(serve: Any, request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        serve, request_deserializer=request.FromString, response_serializer=lambda message: message.SerializeToString()
    )
