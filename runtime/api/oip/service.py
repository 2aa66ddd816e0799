"""inference.GRPCInferenceService: the Open Inference Protocol, with text as BYTES tensors and OpenAI's parameter names."""

import grpc.aio

from common.version import package_version
from runtime.api.grpc_errors import AnyContext, model_id_header, statuses
from runtime.api.model_lookup import find_model
from runtime.api.oip.plan import parameters_of, plan_inference
from runtime.api.oip.tensors import INPUT, OUTPUT, prompts_of, put_texts
from runtime.api.openai.types import Shared
from runtime.api.tokenization import encode_texts
from runtime.errors import InvalidRequest, RepertoryError, Unavailable
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.types import FinishReason
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
            answer.name = _shown_name(model, request.name)
            answer.versions.append("1")
            answer.platform = "repertory"
            answer.inputs.add(name=INPUT, datatype="BYTES", shape=[-1])
            answer.outputs.add(name=OUTPUT, datatype="BYTES", shape=[-1])
            facts = model.facts
            properties = {
                "architecture": facts.architecture,
                "dtype": facts.dtype,
                "quantization": facts.quantization.value,
                "max_model_len": str(facts.max_model_len),
                "vocab_size": str(facts.vocab_size),
                "num_parameters": str(facts.num_parameters),
            }
            for name, value in properties.items():
                answer.properties[name] = value
        return answer

    async def ModelInfer(
        self,
        request: pb.ModelInferRequest,
        context: grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse],
    ) -> pb.ModelInferResponse:
        answer = pb.ModelInferResponse(model_version="1", id=request.id)
        async with statuses(context):
            model = self._model(context, request.model_name, request.model_version)
            answer.model_name = _shown_name(model, request.model_name)
            texts = prompts_of(request)
            put_texts(
                answer,
                await self._complete(model, texts, parameters_of(request.parameters)),
                raw=bool(request.raw_input_contents),
            )
        return answer

    async def _complete(self, model: ServedModel, texts: list[str], body: Shared) -> list[str]:
        if not texts:
            return []
        check_count(model, len(texts))
        check_chars(model, texts)
        prompts = await encode_texts(model, texts, add_special_tokens=body.add_special_tokens is not False)
        results = await self._generator.complete(model, plan_inference(model, body, prompts))
        if any(result.finish is FinishReason.ABORTED for result in results):
            raise Unavailable(
                "it was unloaded, or the runtime stopped, before the answer was complete", model=model.name
            )
        return [result.text for result in results]

    def _model(self, context: AnyContext, name: str, version_asked: str) -> ServedModel:
        model = find_model(self._directory, model_id_header(context), name)
        if version_asked not in ("", "1"):
            # NOT_FOUND would make a mesh load the model again.
            raise InvalidRequest(f"it has no version {version_asked}, only 1", model=_shown_name(model, name))
        return model


def _shown_name(model: ServedModel, asked: str) -> str:
    """Return the name for the response: as the client wrote it, but not an id that a mesh put in its place."""
    return model.name if asked in ("", model.model_id) else asked
