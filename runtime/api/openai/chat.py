"""POST /v1/chat/completions: parse, plan, generate, answer."""

from aiohttp import web

from runtime.api.openai.chat_prepare import PreparedChat, prepare_chat
from runtime.api.openai.chunks import CHAT_DELTAS, EventChunks, Head, StreamUsage
from runtime.api.openai.content_parts import unknown_in_parts
from runtime.api.openai.context import adapted_model_of, json_response, new_id, now, read_body, run_large
from runtime.api.openai.responses import Answer, ChatChoice, chat_choice, usage
from runtime.api.openai.stream import send_events
from runtime.api.openai.structured import unknown_in_format
from runtime.api.openai.types import ChatBody
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, ServedModel


class ChatCompletions:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, ChatBody)
        body = parsed.body
        model = adapted_model_of(request, self._directory, body)
        chat = await prepare_chat(model, body)
        requests, make_parser = chat.requests, chat.make_parser
        in_parts = (
            name
            for index, turn in enumerate(body.messages)
            for name in unknown_in_parts(f"messages.{index}.content", turn.content)
        )
        warning = parsed.with_unknown((*in_parts, *unknown_in_format(body.response_format))).warning_with(chat.notes)
        shown_name = body.model or model.name
        if body.stream:
            head = Head(new_id("chatcmpl"), "chat.completion.chunk", now(), shown_name)
            counts = StreamUsage(chat.num_prompt, len(requests), len(requests), body.stream_options)
            chunks = EventChunks(model, head, counts, CHAT_DELTAS, names_function=chat.names_function)
            return await send_events(request, self._generator.stream(model, requests, make_parser), chunks, warning)
        return json_response(await self._answer(model, shown_name, chat), warning)

    async def _answer(self, model: ServedModel, shown_name: str, chat: PreparedChat) -> Answer[ChatChoice]:
        requests = chat.requests
        results = await self._generator.complete(model, requests, chat.make_parser)
        details = requests[0].with_details
        choices = await run_large(
            lambda: [
                chat_choice(model, result, with_logprobs=details, names_function=chat.names_function)
                for result in results
            ],
            results,
        )
        counted = usage(
            len(requests[0].prompt),
            sum(len(result.tokens) for result in results),
            results[0].cached_tokens,
            sum(result.num_reasoning for result in results),
        )
        return Answer(new_id("chatcmpl"), "chat.completion", now(), shown_name, choices, counted)
