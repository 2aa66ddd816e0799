"""fmaas.GenerationService: TGIS's gRPC service. `params` has the checks and the planner, `responses` the messages."""

from collections.abc import AsyncIterator, Sequence

import grpc.aio

from runtime.api.grammars import guide_answer
from runtime.api.grpc_errors import AnyContext, model_id_header, statuses
from runtime.api.model_lookup import find_adapter, find_model
from runtime.api.tgis.params import Prompt, adapter_of, check, deadline_of, plan, wanted_of
from runtime.api.tgis.responses import Answers
from runtime.api.tokenization import encode_last, encode_texts
from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count
from runtime.generation.merge import close
from runtime.interfaces import ModelDirectory, ServedModel
from wire.fmaas import generation_pb2 as pb
from wire.fmaas import generation_pb2_grpc as rpc


class GenerationService(rpc.GenerationServiceServicer):
    def __init__(self, directory: ModelDirectory, generator: Generator, config: RuntimeConfig) -> None:
        self._directory = directory
        self._generator = generator
        self._config = config

    async def Generate(
        self,
        request: pb.BatchedGenerationRequest,
        context: grpc.aio.ServicerContext[pb.BatchedGenerationRequest, pb.BatchedGenerationResponse],
    ) -> pb.BatchedGenerationResponse:
        answer = pb.BatchedGenerationResponse()
        async with statuses(context):
            deadline_s = deadline_of(request.params)
            model = self._adapted(context, request)
            check(request.params, self._config.max_new_tokens)
            check_count(model, len(request.requests))
            prompts = await _prompts(model, [each.text for each in request.requests], request.params)
            guide = await guide_answer(model, wanted_of(request.params))
            planned = plan(model, self._config, request.params, prompts, deadline_s, guide.grammar)
            if planned:
                answers = Answers(model.text, request.params.response)
                results = await self._generator.complete(model, [each.request for each in planned])
                for each, result, prompt in zip(planned, results, prompts, strict=True):
                    answer.responses.append(answers.whole(each, result, prompt.text))
        return answer

    async def GenerateStream(
        self,
        request: pb.SingleGenerationRequest,
        context: grpc.aio.ServicerContext[pb.SingleGenerationRequest, pb.GenerationResponse],
    ) -> AsyncIterator[pb.GenerationResponse]:
        async with statuses(context):
            deadline_s = deadline_of(request.params)
            model = self._adapted(context, request)
            check(request.params, self._config.max_new_tokens)
            if not request.HasField("request"):
                raise InvalidRequest("missing request")
            [prompt] = await _prompts(model, [request.request.text], request.params)
            guide = await guide_answer(model, wanted_of(request.params))
            [planned] = plan(model, self._config, request.params, [prompt], deadline_s, guide.grammar)
            answers = Answers(model.text, request.params.response)
            yield answers.first(planned, prompt.text)
            inputs_due = request.params.response.input_tokens
            deltas = self._generator.stream(model, [planned.request])
            try:
                async for delta in deltas:
                    if inputs_due:
                        inputs_due = False
                        yield answers.inputs(planned, delta)
                    message = answers.delta(planned, delta)
                    if message is not None:
                        yield message
            finally:
                await close(deltas)

    async def Tokenize(
        self,
        request: pb.BatchedTokenizeRequest,
        context: grpc.aio.ServicerContext[pb.BatchedTokenizeRequest, pb.BatchedTokenizeResponse],
    ) -> pb.BatchedTokenizeResponse:
        answer = pb.BatchedTokenizeResponse()
        async with statuses(context):
            model = self._adapted(context, request)
            for found in await encode_last(
                model, [each.text for each in request.requests], request.truncate_input_tokens
            ):
                answer.responses.append(
                    pb.TokenizeResponse(
                        token_count=len(found.ids),
                        tokens=found.pieces if request.return_tokens else (),
                        offsets=[pb.TokenizeResponse.Offset(start=start, end=end) for start, end in found.offsets]
                        if request.return_offsets
                        else (),
                    )
                )
        return answer

    async def ModelInfo(
        self, request: pb.ModelInfoRequest, context: grpc.aio.ServicerContext[pb.ModelInfoRequest, pb.ModelInfoResponse]
    ) -> pb.ModelInfoResponse:
        async with statuses(context):
            model = self._model(context, request.model_id)
            length = model.facts.max_model_len
            return pb.ModelInfoResponse(
                model_kind=pb.ModelInfoResponse.DECODER_ONLY,
                max_sequence_length=length,
                max_new_tokens=min(self._config.max_new_tokens, length - 1),
            )
        raise AssertionError("unreachable: the call was ended")

    def _adapted(
        self,
        context: AnyContext,
        request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest | pb.BatchedTokenizeRequest,
    ) -> ServedModel:
        model = self._model(context, request.model_id)
        field, asked = adapter_of(request)
        return find_adapter(self._directory, model, asked, field, by_header=bool(model_id_header(context)))

    def _model(self, context: AnyContext, asked: str) -> ServedModel:
        return find_model(self._directory, model_id_header(context), asked, lone_takes_all=True)


async def _prompts(model: ServedModel, texts: Sequence[str], params: pb.Parameters) -> list[Prompt]:
    if params.truncate_input_tokens:
        found = [encoding.ids for encoding in await encode_last(model, texts, params.truncate_input_tokens)]
    else:
        check_chars(model, texts)
        found = [tuple(ids) for ids in await encode_texts(model, texts, add_special_tokens=True)]
    return [Prompt(text, ids) for text, ids in zip(texts, found, strict=True)]
