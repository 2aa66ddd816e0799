"""mmesh.ModelRuntime: the mesh loads and unloads models here, and reads sizes and status.

The comments in proto/mmesh/model_runtime.proto specify the methods.
"""

import grpc.aio

from common.model_id import InvalidModelId, check_model_id
from common.unload_headers import GRACE_HEADER, RETRY_HEADER
from common.version import package_version
from runtime.api.grpc_errors import statuses
from runtime.config.schema import RuntimeConfig
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineState
from runtime.errors import InvalidRequest, ModelNotFound
from runtime.models.capacity import Capacity, budgets_of, capacity_of
from runtime.models.manager import Models
from runtime.models.model_key import parse_model
from runtime.puller.inspection import ModelInspector
from runtime.puller.size_prediction import SizePredictor, Sizing
from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeServicer, add_ModelRuntimeServicer_to_server

SERVICE_NAME = "mmesh.ModelRuntime"
_PREDICT_S = 0.25
# Methods whose request has the model's name in field 1, for a mesh that injects ids there instead of in a header.
_ID_IN_FIELD_1 = (
    "fmaas.GenerationService/Generate",
    "fmaas.GenerationService/GenerateStream",
    "fmaas.GenerationService/Tokenize",
    "fmaas.GenerationService/ModelInfo",
    "inference.GRPCInferenceService/ModelReady",
    "inference.GRPCInferenceService/ModelMetadata",
    "inference.GRPCInferenceService/ModelInfer",
)


class ModelRuntimeApi(ModelRuntimeServicer):
    """The service. `cache_budget_bytes` is the size of the disk tier."""

    def __init__(
        self,
        config: RuntimeConfig,
        engine: EngineGroups,
        models: Models,
        fitter: ModelInspector,
        cache_budget_bytes: int,
    ) -> None:
        self._config = config
        self._engine = engine
        self._models = models
        self._cache_budget_bytes = cache_budget_bytes
        self._sizes = SizePredictor(fitter, self._sizing)

    async def loadModel(
        self,
        request: pb.LoadModelRequest,
        context: "grpc.aio.ServicerContext[pb.LoadModelRequest, pb.LoadModelResponse]",
    ) -> pb.LoadModelResponse:
        async with statuses(context, names_model=False):
            _check_id(request.modelId)
            source, settings = parse_model(request.modelPath, request.modelKey)
            served = await self._models.load(request.modelId, source, settings)
            max_rows = self._config.engine.max_rows
            return pb.LoadModelResponse(
                sizeInBytes=(await self._capacity()).charge_of(served.facts),
                # ModelMesh computes max(16, 8 × n) in 32 bits, so an unlimited n overflows.
                maxConcurrency=min(settings.max_concurrency or max_rows, max_rows),
            )

    async def unloadModel(
        self,
        request: pb.UnloadModelRequest,
        context: "grpc.aio.ServicerContext[pb.UnloadModelRequest, pb.UnloadModelResponse]",
    ) -> pb.UnloadModelResponse:
        async with statuses(context):
            _check_id(request.modelId)
            metadata = context.invocation_metadata() or ()
            grace_s = 0.0 if (GRACE_HEADER, "0") in metadata else self._config.grace_s
            allow_retry = (RETRY_HEADER, "1") in metadata
            await self._models.unload(request.modelId, grace_s=grace_s, allow_retry=allow_retry)
            return pb.UnloadModelResponse()

    async def predictModelSize(
        self,
        request: pb.PredictModelSizeRequest,
        context: "grpc.aio.ServicerContext[pb.PredictModelSizeRequest, pb.PredictModelSizeResponse]",
    ) -> pb.PredictModelSizeResponse:
        async with statuses(context):
            source, settings = parse_model(request.modelPath, request.modelKey)
        return pb.PredictModelSizeResponse(sizeInBytes=await self._sizes.predict(source, settings, _PREDICT_S))

    async def modelSize(
        self,
        request: pb.ModelSizeRequest,
        context: "grpc.aio.ServicerContext[pb.ModelSizeRequest, pb.ModelSizeResponse]",
    ) -> pb.ModelSizeResponse:
        async with statuses(context):
            _check_id(request.modelId)
            for served in self._models.list():
                if served.model_id == request.modelId:
                    return pb.ModelSizeResponse(sizeInBytes=(await self._capacity()).charge_of(served.facts))
            raise ModelNotFound("it is not loaded here", model=request.modelId)

    async def runtimeStatus(
        self,
        request: pb.RuntimeStatusRequest,
        context: "grpc.aio.ServicerContext[pb.RuntimeStatusRequest, pb.RuntimeStatusResponse]",
    ) -> pb.RuntimeStatusResponse:
        if self._engine.state is EngineState.STOPPED:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.FAILING, runtimeVersion=package_version())
        if self._engine.state is not EngineState.READY:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING, runtimeVersion=package_version())
        await self._models.purge()
        capacity = await self._capacity()
        info = pb.RuntimeStatusResponse.MethodInfo(idInjectionPath=[1])
        return pb.RuntimeStatusResponse(
            status=pb.RuntimeStatusResponse.READY,
            capacityInBytes=capacity.capacity_bytes,
            # A mesh counts a load from its pull on. Fewer would let slow sources keep local models waiting.
            maxLoadingConcurrency=self._config.max_loading_concurrency + self._config.max_pulling_concurrency,
            modelLoadingTimeoutMs=max(100, int(self._config.load_timeout_s * 1000)),
            defaultModelSizeInBytes=capacity.default_size_bytes,
            runtimeVersion=package_version(),
            methodInfos=dict.fromkeys(_ID_IN_FIELD_1, info),
            limitModelConcurrency=True,
            allowAnyMethod=True,
        )

    async def _sizing(self) -> Sizing:
        capacity = await self._capacity()
        return Sizing(self._engine.device, capacity, budgets_of(self._engine.groups))

    async def _capacity(self) -> Capacity:
        await self._engine.wait_ready()
        return capacity_of(self._config.engine.oversubscribe, self._engine.groups, self._cache_budget_bytes)


def add_spi(server: grpc.aio.Server, api: ModelRuntimeApi) -> str:
    add_ModelRuntimeServicer_to_server(api, server)
    return SERVICE_NAME


def _check_id(model_id: str) -> None:
    try:
        check_model_id(model_id, "modelId")
    except InvalidModelId as error:
        raise InvalidRequest(str(error), param="modelId") from None
