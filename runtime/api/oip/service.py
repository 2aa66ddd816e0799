"""inference.GRPCInferenceService: the Open Inference Protocol, with text as BYTES tensors and OpenAI's parameter names."""

import grpc.aio

from common.version import package_version
from runtime.api.grpc_errors import AnyContext, model_id_header, statuses
from runtime.api.oip.completion import complete_texts
from runtime.api.oip.model import PLATFORM, VERSION, model_named, properties_of, shown_name
from runtime.api.oip.plan import message_parameters, parameters_of
from runtime.api.oip.tensors import DATATYPE, INPUT, OUTPUT, prompts_of, put_texts
from runtime.errors import RepertoryError, Unavailable
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, ServedModel
from wire.inference import grpc_predict_v2_pb2 as pb
from wire.inference import grpc_predict_v2_pb2_grpc as rpc


class InferenceService(rpc.GRPCInferenceServiceServicer):
    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def ServerLive(
        self,
        request: pb.ServerLiveRequest,
        context: grpc.aio.ServicerContext[pb.ServerLiveRequest, pb.ServerLiveResponse],
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self,
        request: pb.ServerReadyRequest,
        context: grpc.aio.ServicerContext[pb.ServerReadyRequest, pb.ServerReadyResponse],
    ) -> pb.ServerReadyResponse:
        try:
            self._directory.list()
        except Unavailable:
            return pb.ServerReadyResponse(ready=False)
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(
        self,
        request: pb.ModelReadyRequest,
        context: grpc.aio.ServicerContext[pb.ModelReadyRequest, pb.ModelReadyResponse],
    ) -> pb.ModelReadyResponse:
        try:
            self._model(context, request.name, request.version)
        except RepertoryError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,
        context: grpc.aio.ServicerContext[pb.ServerMetadataRequest, pb.ServerMetadataResponse],
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="repertory", version=package_version())

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: grpc.aio.ServicerContext[pb.ModelMetadataRequest, pb.ModelMetadataResponse],
    ) -> pb.ModelMetadataResponse:
        answer = pb.ModelMetadataResponse()
        async with statuses(context):
            model = self._model(context, request.name, request.version)
            answer.name = shown_name(model, request.name)
            answer.versions.append(VERSION)
            answer.platform = PLATFORM
            answer.inputs.add(name=INPUT, datatype=DATATYPE, shape=[-1])
            answer.outputs.add(name=OUTPUT, datatype=DATATYPE, shape=[-1])
            answer.properties.update(properties_of(model))
        return answer

    async def ModelInfer(
        self,
        request: pb.ModelInferRequest,
        context: grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse],
    ) -> pb.ModelInferResponse:
        answer = pb.ModelInferResponse(model_version=VERSION, id=request.id)
        async with statuses(context):
            model = self._model(context, request.model_name, request.model_version)
            answer.model_name = shown_name(model, request.model_name)
            prompts = prompts_of(request)
            parameters = parameters_of(message_parameters(request.parameters))
            texts = await complete_texts(self._generator, model, prompts, parameters)
            put_texts(answer, texts, raw=bool(request.raw_input_contents))
        return answer

    def _model(self, context: AnyContext, name: str, version_asked: str) -> ServedModel:
        return model_named(self._directory, model_id_header(context), name, version_asked)
