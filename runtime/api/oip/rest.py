"""The Open Inference Protocol's REST API below /v2, with Triton's binary tensors and the generate extension."""

from typing import Any

import msgspec
from aiohttp import web

from common.version import package_version
from runtime.api.model_lookup import MODEL_ID_HEADER
from runtime.api.oip.completion import complete_texts, plan_texts
from runtime.api.oip.generate_events import GenerateEvents
from runtime.api.oip.model import PLATFORM, VERSION, model_named, properties_of, shown_name
from runtime.api.oip.plan import parameters_of
from runtime.api.oip.rest_tensors import (
    BINARY_EXTENSION,
    JSON_LENGTH_HEADER,
    answer_body,
    generation_parameters,
    split_body,
    texts_in,
)
from runtime.api.oip.rest_types import (
    ErrorAnswer,
    GenerateAnswer,
    GenerateBody,
    InferAnswer,
    InferBody,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    TensorMetadata,
)
from runtime.api.oip.tensors import DATATYPE, INPUT, OUTPUT
from runtime.api.openai.body import parse
from runtime.api.openai.context import json_response, read_body
from runtime.api.openai.responses import encode
from runtime.api.openai.stream import send_events
from runtime.api.openai.types import Shared
from runtime.api.protocol_errors import ErrorShape
from runtime.api.route import Route
from runtime.errors import RepertoryError
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, ServedModel

_MODEL = "/v2/models/{name:.+}"


def _error_body(error: RepertoryError) -> bytes:
    return encode(ErrorAnswer(error.message))


_ERRORS = ErrorShape(ErrorAnswer, _error_body)


class RestInference:
    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    def routes(self) -> list[Route]:
        """Return the routes. Those with more after the name come first, since a name may contain slashes."""
        found = [
            Route("GET", "/v2", self._server_metadata, "Describe the server", answer=ServerMetadata),
            Route("GET", "/v2/health/live", self._live, "Report that the server is alive", answer=Live),
            Route("GET", "/v2/health/ready", self._ready, "Report whether requests are taken", answer=Ready),
        ]
        for path in (_MODEL + "/versions/{version}", _MODEL):
            found += [
                Route("GET", path + "/ready", self._model_ready, "Report whether a model is ready", answer=ModelReady),
                Route("POST", path + "/infer", self._infer, "Complete a tensor of prompts", InferBody, InferAnswer),
                Route("POST", path + "/generate", self._generate, "Complete one prompt", GenerateBody, GenerateAnswer),
                Route(
                    "POST",
                    path + "/generate_stream",
                    self._generate_stream,
                    "Complete one prompt as a stream",
                    GenerateBody,
                    stream="text/event-stream",
                ),
            ]
        found += [
            Route("GET", path, self._model_metadata, "Describe a model", answer=ModelMetadata)
            for path in (_MODEL + "/versions/{version}", _MODEL)
        ]
        return [_ERRORS.shape(route) for route in found]

    async def _server_metadata(self, request: web.Request) -> web.Response:
        return json_response(ServerMetadata("repertory", package_version(), [BINARY_EXTENSION, "generate"]))

    async def _live(self, request: web.Request) -> web.Response:
        return json_response(Live(True))

    async def _ready(self, request: web.Request) -> web.Response:
        self._directory.list()  # raises Unavailable, which is answered with 503
        return json_response(Ready(True))

    async def _model_ready(self, request: web.Request) -> web.Response:
        model = self._model(request)
        return json_response(ModelReady(shown_name(model, request.match_info["name"]), True))

    async def _model_metadata(self, request: web.Request) -> web.Response:
        model = self._model(request)
        answer = ModelMetadata(
            shown_name(model, request.match_info["name"]),
            [VERSION],
            PLATFORM,
            [TensorMetadata(INPUT, DATATYPE, [-1])],
            [TensorMetadata(OUTPUT, DATATYPE, [-1])],
            properties_of(model),
        )
        return json_response(answer)

    async def _infer(self, request: web.Request) -> web.Response:
        head, binary = split_body(await request.read(), request.headers.get(JSON_LENGTH_HEADER))
        parsed = parse(head, InferBody)
        body = parsed.body
        model = self._model(request)
        prompts = texts_in(body, binary)
        texts = await complete_texts(self._generator, model, prompts, parameters_of(generation_parameters(body)))
        content, json_length = answer_body(shown_name(model, request.match_info["name"]), VERSION, body, texts)
        response = web.Response(body=content, content_type="application/json")
        if json_length is not None:
            response.content_type = "application/octet-stream"
            response.headers[JSON_LENGTH_HEADER] = str(json_length)
        if parsed.warning is not None:
            response.headers["Warning"] = parsed.warning
        return response

    async def _generate(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, GenerateBody)
        model = self._model(request)
        [text] = await complete_texts(self._generator, model, [parsed.body.text_input], _parameters(parsed.body))
        name = shown_name(model, request.match_info["name"])
        return json_response(GenerateAnswer(name, VERSION, text), parsed.warning)

    async def _generate_stream(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, GenerateBody)
        model = self._model(request)
        requests = await plan_texts(model, [parsed.body.text_input], _parameters(parsed.body))
        events = GenerateEvents(model, shown_name(model, request.match_info["name"]), _error_body)
        return await send_events(request, self._generator.stream(model, requests), events, parsed.warning)

    def _model(self, request: web.Request) -> ServedModel:
        found = request.match_info
        return model_named(
            self._directory, request.headers.get(MODEL_ID_HEADER), found["name"], found.get("version", "")
        )


def _parameters(body: GenerateBody) -> Shared:
    """Return the body with the values of its `parameters` in place of those beside the prompt."""
    given = parameters_of(body.parameters)
    values: dict[str, Any] = {name: getattr(given, name) for name in body.parameters}
    return msgspec.structs.replace(body, **values)
