"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API, without state."""

from aiohttp import web

from runtime.api.anthropic.as_chat import as_chat
from runtime.api.anthropic.events import MessageEvents
from runtime.api.anthropic.responses import ErrorAnswer, Message, TokenCount, error_body, message
from runtime.api.anthropic.types import MessagesBody, PromptBody
from runtime.api.anthropic.unknown_fields import unknown_in_blocks
from runtime.api.openai.chat_prepare import prepare_chat, render_prompt
from runtime.api.openai.context import json_response, model_of, read_body
from runtime.api.openai.stream import send_events
from runtime.api.openai.tools import plan_tools
from runtime.api.protocol_errors import ErrorShape
from runtime.api.route import Route
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory

_ERRORS = ErrorShape(ErrorAnswer, error_body)


class Messages:
    """Both routes' handlers."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    def routes(self) -> list[Route]:
        count = "/v1/messages/count_tokens"
        own = [
            Route("POST", "/v1/messages", self._post, "Answer messages", MessagesBody, Message, "text/event-stream"),
            Route("POST", count, self._count_tokens, "Count a prompt's tokens", PromptBody, TokenCount),
        ]
        return [_ERRORS.shape(route) for route in own]

    async def _post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, MessagesBody)
        body = parsed.body
        parsed = parsed.with_unknown(unknown_in_blocks(body))
        model = model_of(request, self._directory, body.model)
        # Clients ask for the output limit of the model that they were made for.
        chat = await prepare_chat(model, as_chat(body), cut_to_context=True, format_param="output_config.format")
        shown_name = body.model or model.name
        warning = parsed.warning_with(chat.notes)
        if body.stream:
            events = MessageEvents(model, shown_name, chat.num_prompt)
            deltas = self._generator.stream(model, chat.requests, chat.make_parser)
            return await send_events(request, deltas, events, warning)
        [result] = await self._generator.complete(model, chat.requests, chat.make_parser)
        return json_response(message(model, shown_name, chat.num_prompt, result), warning)

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, PromptBody)
        model = model_of(request, self._directory, parsed.body.model)
        chat = as_chat(parsed.body)
        _, prompt = await render_prompt(model, chat, plan_tools(model, chat.tools, chat.tool_choice))
        return json_response(TokenCount(len(prompt)), parsed.with_unknown(unknown_in_blocks(parsed.body)).warning)
