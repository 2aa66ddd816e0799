"""POST /v1/chat/completions: parse, plan, generate, answer."""

from aiohttp import web

from runtime.api.openai.chat_plan import chat_options, parser_of, plan_chat
from runtime.api.openai.chunks import CHAT_DELTAS, EventChunks, Head, StreamUsage
from runtime.api.openai.context import json_response, model_of, new_id, now, read_body, render_chat, run_large
from runtime.api.openai.responses import Answer, chat_choice, usage
from runtime.api.openai.stream import send_events
from runtime.api.openai.tools import plan_tools
from runtime.api.openai.types import ChatBody
from runtime.api.tokenization import encode_text
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars
from runtime.generation.parser import MakeParser
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.types import GenerationRequest


class ChatCompletions:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, ChatBody)
        body = parsed.body
        model = model_of(request, self._directory, body.model)
        tools = plan_tools(model, body.tools, body.tool_choice, body.parallel_tool_calls)
        text = await render_chat(model, body.messages, chat_options(body, tools))
        requests = plan_chat(model, body, await _prompt(model, body, text))
        make_parser = parser_of(
            model, tools, text, whole_calls=not body.stream, show_reasoning=body.include_reasoning is not False
        )
        warning = parsed.warning_with(tools.notes)
        shown_name = body.model or model.name
        if body.stream:
            head = Head(new_id("chatcmpl"), "chat.completion.chunk", now(), shown_name)
            counts = StreamUsage(len(requests[0].prompt), len(requests), len(requests), body.stream_options)
            chunks = EventChunks(model, head, counts, CHAT_DELTAS)
            return await send_events(request, self._generator.stream(model, requests, make_parser), chunks, warning)
        return json_response(await self._answer(model, shown_name, requests, make_parser), warning)

    async def _answer(
        self, model: ServedModel, shown_name: str, requests: list[GenerationRequest], make_parser: MakeParser
    ) -> Answer:
        results = await self._generator.complete(model, requests, make_parser)
        details = requests[0].with_details
        choices = await run_large(
            lambda: [chat_choice(model, result, with_logprobs=details) for result in results], results
        )
        counted = usage(
            len(requests[0].prompt),
            sum(len(result.tokens) for result in results),
            results[0].cached_tokens,
            sum(result.num_reasoning for result in results),
        )
        return Answer(new_id("chatcmpl"), "chat.completion", now(), shown_name, choices, counted)


async def _prompt(model: ServedModel, body: ChatBody, text: str) -> list[int]:
    if body.truncate_prompt_tokens is None:
        check_chars(model, [text], param="messages")
    return await encode_text(model, text, add_special_tokens=bool(body.add_special_tokens))
