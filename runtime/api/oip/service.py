"""inference.GRPCInferenceService: the Open Inference Protocol, with text as BYTES tensors and OpenAI's parameter names."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc.aio
import msgspec

from runtime.api.grpc_errors import AnyContext, model_id_header, statuses
from runtime.api.model_lookup import find_model
from runtime.api.oip.tensors import INPUT, OUTPUT, prompts_of, put_texts
from runtime.api.openai.params import check_ranges, sequences
from runtime.api.openai.types import Shared
from runtime.api.tokenization import encode_texts
from runtime.errors import InvalidRequest, RepertoryError, Unavailable
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count, check_output, room_for_output
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.types import FinishReason, LogprobParams
from wire.inference import grpc_predict_v2_pb2 as pb
from wire.inference import grpc_predict_v2_pb2_grpc as rpc

DEFAULT_MAX_TOKENS = 16
PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "min_tokens", "stop", "seed", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "priority",
)  # fmt: skip


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
        return pb.ServerMetadataResponse(name="repertory", version=_version())

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: grpc.aio.ServicerContext[pb.ModelMetadataRequest, pb.ModelMetadataResponse],
    ) -> pb.ModelMetadataResponse:
        answer = pb.ModelMetadataResponse()
        async with statuses(context):
            model = self._model(context, request.name, request.version)
            answer.name = _told(model, request.name)
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
            answer.model_name = _told(model, request.model_name)
            texts = prompts_of(request)
            put_texts(
                answer,
                await self._complete(model, texts, _parameters(request.parameters)),
                raw=bool(request.raw_input_contents),
            )
        return answer

    async def _complete(self, model: ServedModel, texts: list[str], body: Shared) -> list[str]:
        if not texts:
            return []
        check_ranges(model, body)
        special = body.add_special_tokens is not False
        check_count(model, len(texts))
        check_chars(model, texts)
        prompts = await encode_texts(model, texts, add_special_tokens=special)
        limits = [_max_tokens(model, body, len(prompt)) for prompt in prompts]
        results = await self._generator.complete(model, sequences(model, body, prompts, limits, LogprobParams()))
        if any(result.finish is FinishReason.ABORTED for result in results):
            raise Unavailable(
                "it was unloaded, or the runtime stopped, before the answer was complete", model=model.name
            )
        return [result.text for result in results]

    def _model(self, context: AnyContext, name: str, version_asked: str) -> ServedModel:
        model = find_model(self._directory, model_id_header(context), name)
        if version_asked not in ("", "1"):
            # NOT_FOUND would have a mesh load the model again
            raise InvalidRequest(f"it has no version {version_asked}, only 1", model=_told(model, name))
        return model


def _max_tokens(model: ServedModel, body: Shared, num_prompt: int) -> int:
    room = room_for_output(model, num_prompt, param=INPUT)
    if body.max_tokens is None:
        return min(room, model.text.sampling.max_tokens or DEFAULT_MAX_TOKENS)
    if body.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be >= 1, got {body.max_tokens}", model=model.name, param="max_tokens")
    check_output(model, num_prompt, body.max_tokens)
    return body.max_tokens


def _parameters(given: Mapping[str, pb.InferParameter]) -> Shared:
    """`stop` is one string, or a JSON list of them."""
    values: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name not in PARAMETERS:
            raise InvalidRequest(f"there is no parameter {name}; there are: {', '.join(PARAMETERS)}", param=name)
        if kind is not None:
            values[name] = getattr(parameter, kind)
    stop = values.get("stop")
    try:
        if isinstance(stop, str) and stop.startswith("["):
            values["stop"] = msgspec.json.decode(stop, type=list[str])
        return msgspec.convert(values, Shared, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRequest(f"a parameter has the wrong type: {error}") from error


def _told(model: ServedModel, asked: str) -> str:
    """The name that an answer carries: as the caller wrote it, but not the id that a mesh put in its place."""
    return model.name if asked in ("", model.model_id) else asked


def _version() -> str:
    try:
        return version("repertory")
    except PackageNotFoundError:
        return "0"
