"""POST /v1/responses: OpenAI's Responses API without state."""

from aiohttp import web

from runtime.api.openai.chat_prepare import prepare_chat
from runtime.api.openai.context import json_response, model_of, read_body
from runtime.api.openai.stream import send_events
from runtime.api.openai_responses.as_chat import as_chat, notes_of, unknown_in_items
from runtime.api.openai_responses.events import ResponseEvents
from runtime.api.openai_responses.items import begun, whole
from runtime.api.openai_responses.types import ResponsesBody
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory


class Responses:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, ResponsesBody)
        body = parsed.body
        parsed = parsed.with_unknown(unknown_in_items(body))
        model = model_of(request, self._directory, body.model)
        chat = await prepare_chat(model, as_chat(body), cut_to_context=True, format_param="text.format")
        warning = parsed.warning_with((*chat.notes, *notes_of(body)))
        response = begun(body, body.model or model.name)
        if body.stream:
            events = ResponseEvents(model, response, chat.num_prompt)
            deltas = self._generator.stream(model, chat.requests, chat.make_parser)
            return await send_events(request, deltas, events, warning)
        [result] = await self._generator.complete(model, chat.requests, chat.make_parser)
        return json_response(whole(response, model, chat.num_prompt, result), warning)
