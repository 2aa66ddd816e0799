"""Ollama's POST /api/chat, /api/generate, /api/embed and /api/show. The mesh answers the routes that list models itself."""

from typing import TypeVar

import msgspec
from aiohttp import web

from runtime.api.grammars import guide_answer
from runtime.api.model_lookup import MODEL_ID_HEADER
from runtime.api.ollama.as_chat import as_chat, check_keep_alive, notes_of, prompt_as_chat, unknown_options
from runtime.api.ollama.embed import Embed, EmbedAnswer, EmbedRequest, OldEmbedAnswer, OldEmbedRequest
from runtime.api.ollama.lines import AnswerLines, MakeLine, chat_line, generate_line, loaded_line
from runtime.api.ollama.lookup import find_tagged
from runtime.api.ollama.show import show
from runtime.api.ollama.types import (
    ChatLine,
    ChatRequest,
    ErrorAnswer,
    GenerateLine,
    GenerateRequest,
    Request,
    ShowAnswer,
    ShowRequest,
)
from runtime.api.openai.body import Parsed
from runtime.api.openai.chat_plan import plan_chat
from runtime.api.openai.chat_prepare import PreparedChat, prepare_chat
from runtime.api.openai.context import json_response, read_body
from runtime.api.openai.responses import encode
from runtime.api.openai.stream import JSON_LINES, send_events
from runtime.api.openai.structured import wanted_of
from runtime.api.openai.types import ChatBody
from runtime.api.protocol_errors import ErrorShape
from runtime.api.route import Route
from runtime.api.tokenization import encode_text
from runtime.errors import RepertoryError
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars
from runtime.generation.merge import close
from runtime.generation.parser import plain_text
from runtime.generation.parts import Delta
from runtime.interfaces import ModelDirectory, ServedModel

_Asked = TypeVar("_Asked", bound=Request)


def _error_body(error: RepertoryError) -> bytes:
    return encode(ErrorAnswer(error.message))


_ERRORS = ErrorShape(ErrorAnswer, _error_body)


class Ollama:
    """The routes' handlers."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    def routes(self) -> list[Route]:
        lines = JSON_LINES.content_type
        embed = Embed(self._directory, self._generator)
        own = [
            Route("POST", "/api/chat", self._chat, "Answer a chat", ChatRequest, ChatLine, lines),
            Route("POST", "/api/generate", self._generate, "Answer a prompt", GenerateRequest, GenerateLine, lines),
            Route("POST", "/api/show", self._show, "Describe a model", ShowRequest, ShowAnswer),
            Route("POST", "/api/embed", embed.post, "Make embeddings", EmbedRequest, EmbedAnswer),
            Route("POST", "/api/embeddings", embed.post_old, "Make an embedding", OldEmbedRequest, OldEmbedAnswer),
        ]
        return [_ERRORS.shape(route) for route in own]

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        parsed = await _read(request, ChatRequest)
        body = parsed.body
        model = self._model(request, body.model)
        if not body.messages:
            return json_response(loaded_line(_shown_name(model, body), chat_line), parsed.warning)
        prepared = await prepare_chat(model, as_chat(body), cut_to_context=True, format_param="format")
        warning = parsed.warning_with((*prepared.notes, *notes_of(body, model.facts.max_model_len)))
        return await self._answer(request, model, body, prepared, chat_line, warning)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        parsed = await _read(request, GenerateRequest)
        body = parsed.body
        model = self._model(request, body.model)
        if not body.prompt:
            return json_response(loaded_line(_shown_name(model, body), generate_line), parsed.warning)
        chat = prompt_as_chat(body)
        if body.raw or not model.text.has_chat_template:
            prepared = await _prepare_raw(model, chat, body.prompt)
        else:
            prepared = await prepare_chat(model, chat, cut_to_context=True, format_param="format")
        notes = (*prepared.notes, *notes_of(body, model.facts.max_model_len))
        if body.system and not model.text.has_chat_template:
            notes = (*notes, "system has no effect: the model has no chat template")
        return await self._answer(request, model, body, prepared, generate_line, parsed.warning_with(notes))

    async def _answer(
        self,
        request: web.Request,
        model: ServedModel,
        body: Request,
        prepared: PreparedChat,
        make: MakeLine,
        warning: str | None,
    ) -> web.StreamResponse:
        lines = AnswerLines(model, _shown_name(model, body), prepared.num_prompt, make)
        deltas = self._generator.stream(model, prepared.requests, prepared.make_parser)
        if body.stream is not False:
            return await send_events(request, deltas, lines, warning, JSON_LINES)
        found: list[Delta] = []
        try:
            async for delta in deltas:
                lines.note_first()
                found.append(delta)
        finally:
            await close(deltas)
        return json_response(lines.whole(found), warning)

    async def _show(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, ShowRequest)
        return json_response(show(self._model(request, parsed.body.model or parsed.body.name)), parsed.warning)

    def _model(self, request: web.Request, asked: str) -> ServedModel:
        return find_tagged(self._directory, request.headers.get(MODEL_ID_HEADER), asked)


async def _read(request: web.Request, kind: type[_Asked]) -> Parsed[_Asked]:
    """Read a chat or a completion. Raises InvalidRequest naming the field."""
    parsed = await read_body(request, kind)
    check_keep_alive(parsed.body)
    return parsed.with_unknown(unknown_options(parsed.body))


async def _prepare_raw(model: ServedModel, chat: ChatBody, prompt: str) -> PreparedChat:
    """Prepare a prompt that goes to the model as it is. Raises InvalidRequest naming the field."""
    check_chars(model, [prompt])
    tokens = await encode_text(model, prompt, add_special_tokens=True)
    if chat.max_tokens is not None:
        room = model.facts.max_model_len - len(tokens)
        chat = msgspec.structs.replace(chat, max_tokens=min(chat.max_tokens, max(1, room)))
    guide = await guide_answer(model, wanted_of(chat))
    return PreparedChat(guide.apply(plan_chat(model, chat, tokens)), plain_text, guide.notes)


def _shown_name(model: ServedModel, body: Request) -> str:
    return body.model or model.name
