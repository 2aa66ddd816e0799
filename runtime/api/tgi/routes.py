"""text-generation-inference's HTTP API: at the root, where one model is served or named in the request, and below /tgi/NAME."""

import time

from aiohttp import web

from common.version import package_version
from runtime.api.grammars import guide_answer
from runtime.api.model_lookup import MODEL_ID_HEADER, find_adapter, find_model
from runtime.api.openai.chat import ChatCompletions
from runtime.api.openai.completions import Completions
from runtime.api.openai.context import read_body
from runtime.api.openai.params import MAX_STOPS
from runtime.api.openai.responses import Answer as OpenAiAnswer
from runtime.api.openai.responses import ChatChoice, CompletionChoice, encode
from runtime.api.openai.stream import send_events
from runtime.api.openai.types import ChatBody, CompletionBody
from runtime.api.route import Route
from runtime.api.tgi.errors import ERRORS
from runtime.api.tgi.plan import check_parameters, plan_generate, wanted_grammar
from runtime.api.tgi.responses import TokenEvents, answer
from runtime.api.tgi.types import Answer, GenerateBody, Info, Parameters, TokenizeBody, TokenSpan
from runtime.api.tokenization import encode_last, encode_text
from runtime.generation.generator import Generator
from runtime.generation.limits import MAX_SEQUENCES, check_chars
from runtime.interfaces import ModelDirectory, ServedModel

_STREAM = "text/event-stream"
_NAMED = "/tgi/{name:.+}"


class TextGeneration:
    """The routes' handlers. `device` is the engine's, as it is configured."""

    def __init__(self, directory: ModelDirectory, generator: Generator, *, device: str) -> None:
        self._directory = directory
        self._generator = generator
        self._device = device

    def routes(self) -> list[Route]:
        """Return the routes. Those with more after the name come first, since a name may contain slashes."""
        chat = ChatCompletions(self._directory, self._generator)
        completions = Completions(self._directory, self._generator)
        own: list[Route] = []
        for prefix in (_NAMED, ""):
            own += [
                Route("POST", f"{prefix}/generate", self._generate, "Complete a prompt", GenerateBody, Answer),
                Route("POST", f"{prefix}/generate_stream", self._stream, "Stream a text", GenerateBody, stream=_STREAM),
                Route("GET", f"{prefix}/info", self._info, "Describe a model and the server", answer=Info),
                Route(
                    "POST",
                    prefix or "/",
                    self._compatible,
                    "Complete a prompt, with a list of one answer",
                    GenerateBody,
                    list[Answer],
                    _STREAM,
                ),
            ]
        own.insert(
            3, Route("POST", f"{_NAMED}/tokenize", self._tokenize, "Tokenize a text", TokenizeBody, list[TokenSpan])
        )
        return [
            Route(
                "POST",
                f"{_NAMED}/v1/chat/completions",
                chat.post,
                "Answer a chat",
                ChatBody,
                OpenAiAnswer[ChatChoice],
                _STREAM,
            ),
            Route(
                "POST",
                f"{_NAMED}/v1/completions",
                completions.post,
                "Complete prompts",
                CompletionBody,
                OpenAiAnswer[CompletionChoice],
                _STREAM,
            ),
            *(ERRORS.shape(route) for route in own),
        ]

    async def _compatible(self, request: web.Request) -> web.StreamResponse:
        """Serve POST /. As in TGI the prompt is in front of the text, unless the request says otherwise."""
        parsed = await read_body(request, GenerateBody)
        if parsed.body.stream:
            return await self._send_stream(request, parsed.body, parsed.warning, full_text=True)
        return await self._send_whole(request, parsed.body, parsed.warning, full_text=True, in_list=True)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, GenerateBody)
        return await self._send_whole(request, parsed.body, parsed.warning, full_text=False, in_list=False)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, GenerateBody)
        return await self._send_stream(request, parsed.body, parsed.warning, full_text=False)

    async def _send_whole(
        self, request: web.Request, body: GenerateBody, warning: str | None, *, full_text: bool, in_list: bool
    ) -> web.Response:
        start_s = time.monotonic()
        model = self._adapted(request, body)
        parameters = body.parameters or Parameters(do_sample=True)
        check_parameters(model, parameters, stream=False)
        guide = await guide_answer(model, wanted_grammar(parameters))
        [planned] = guide.apply([plan_generate(model, body, await self._prompt(model, body), stream=False)])
        [result] = await self._generator.complete(model, [planned])
        whole = answer(model, parameters, planned, result, _prefix(body, full_text))
        response = web.Response(body=encode([whole] if in_list else whole), content_type="application/json")
        response.headers.update(
            {
                "x-compute-characters": str(len(body.inputs)),
                "x-prompt-tokens": str(len(planned.prompt)),
                "x-generated-tokens": str(len(result.tokens)),
                "x-total-time": str(round((time.monotonic() - start_s) * 1000)),
            }
        )
        if warning is not None:
            response.headers["Warning"] = warning
        return response

    async def _send_stream(
        self, request: web.Request, body: GenerateBody, warning: str | None, *, full_text: bool
    ) -> web.StreamResponse:
        model = self._adapted(request, body)
        parameters = body.parameters or Parameters(do_sample=True)
        check_parameters(model, parameters, stream=True)
        guide = await guide_answer(model, wanted_grammar(parameters))
        [planned] = guide.apply([plan_generate(model, body, await self._prompt(model, body), stream=True)])
        events = TokenEvents(model, parameters, planned, _prefix(body, full_text))
        return await send_events(request, self._generator.stream(model, [planned]), events, warning)

    async def _tokenize(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, TokenizeBody)
        model = self._model(request, parsed.body.model)
        [found] = await encode_last(model, [parsed.body.inputs], 0)
        spans = [
            TokenSpan(token, parsed.body.inputs[start:stop], start, stop)
            for token, (start, stop) in zip(found.ids, found.offsets, strict=True)
        ]
        return web.Response(body=encode(spans), content_type="application/json")

    async def _info(self, request: web.Request) -> web.Response:
        model = self._model(request, request.query.get("model", ""))
        info = Info(
            model_id=model.name,
            model_dtype=model.facts.dtype,
            model_device_type=self._device,
            max_concurrent_requests=model.settings.max_concurrency or 0,
            max_stop_sequences=MAX_STOPS,
            max_input_tokens=model.facts.max_model_len - 1,
            max_total_tokens=model.facts.max_model_len,
            max_client_batch_size=MAX_SEQUENCES,
            version=package_version(),
        )
        return web.Response(body=encode(info), content_type="application/json")

    async def _prompt(self, model: ServedModel, body: GenerateBody) -> list[int]:
        """Return the prompt's tokens: with `truncate` the last ones, and BOS."""
        truncate = body.parameters.truncate if body.parameters else None
        if truncate is not None:
            [kept] = await encode_last(model, [body.inputs], truncate)
            return list(kept.ids)
        check_chars(model, [body.inputs], param="inputs")
        return await encode_text(model, body.inputs, add_special_tokens=True)

    def _adapted(self, request: web.Request, body: GenerateBody) -> ServedModel:
        """Return the model, or the adapter of it that the body names. Without a path and a header, the adapter's name is the model's."""
        model = self._model(request, body.adapter or body.model)
        by_header = MODEL_ID_HEADER in request.headers
        return find_adapter(self._directory, model, body.adapter, "parameters.adapter_id", by_header=by_header)

    def _model(self, request: web.Request, asked: str) -> ServedModel:
        # A client's base URL may end in a slash.
        name = request.match_info.get("name", "").removesuffix("/") or asked
        header = request.headers.get(MODEL_ID_HEADER)
        return find_model(self._directory, header, name, lone_takes_all=not name)


def _prefix(body: GenerateBody, full_text: bool) -> str:
    """Return the prompt if it is to be in front of the text. `full_text`: whether it is where the request does not say."""
    asked = body.parameters.return_full_text if body.parameters else None
    return body.inputs if (full_text if asked is None else asked) else ""
