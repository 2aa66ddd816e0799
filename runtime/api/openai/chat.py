"""POST /v1/chat/completions. Knows OpenAI's chat request and answers; text and tokens are the generator's."""

from aiohttp import web

from runtime.api.openai.body import refuse_unsupported
from runtime.api.openai.chunks import ChunkShape, EventChunks, Head, StreamUsage
from runtime.api.openai.context import json_response, model_of, new_id, now, read_body, render_chat, written_out
from runtime.api.openai.params import check_logprobs, check_ranges, sequences, truncated
from runtime.api.openai.responses import (
    Answer,
    ChatChoice,
    ChatMessageOut,
    chat_logprobs,
    encode,
    finish_word,
    stop_reason,
    usage,
)
from runtime.api.openai.stream import send_events
from runtime.api.openai.types import ChatBody
from runtime.api.tokenization import encode_text
from runtime.errors import InvalidRequest
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_output, room_for_output
from runtime.generation.request import Completed, Delta
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.text.chat import ChatOptions
from runtime.types import GenerationRequest, LogprobParams


class ChatCompletions:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, ChatBody)
        body = parsed.body
        refuse_unsupported(body)
        model = model_of(request, self._directory, body.model)
        check_ranges(model, body)
        prompt = truncated(body, await self._prompt(model, body))
        requests = sequences(model, body, [prompt], [_max_tokens(model, body, len(prompt))], _logprobs(model, body))
        answered = body.model or model.name
        if body.stream:
            head = Head(new_id("chatcmpl"), "chat.completion.chunk", now(), answered)
            counts = StreamUsage(len(prompt), len(requests), len(requests), body.stream_options)
            chunks = EventChunks(model, head, counts, _shape(model))
            return await send_events(request, self._generator.stream(model, requests), chunks, parsed.warning)
        return json_response(await self._answer(model, answered, requests), parsed.warning)

    async def _prompt(self, model: ServedModel, body: ChatBody) -> list[int]:
        by_assistant = bool(body.messages) and body.messages[-1].role == "assistant"
        continues = by_assistant and body.continue_final_message is not False and not body.add_generation_prompt
        options = ChatOptions(
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final=bool(body.continue_final_message) or continues,
            template=body.chat_template,
            variables=body.chat_template_kwargs or {},
        )
        if body.continue_final_message and body.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt can't both be true", param="continue_final_message"
            )
        text = await render_chat(model, body.messages, options)
        if body.truncate_prompt_tokens is None:
            check_chars(model, [text], param="messages")
        return await encode_text(model, text, add_special_tokens=bool(body.add_special_tokens))

    async def _answer(self, model: ServedModel, answered: str, requests: list[GenerationRequest]) -> Answer:
        results = await self._generator.complete(model, requests)
        with_logprobs = requests[0].with_details
        choices = await written_out(
            lambda: [_choice(model, result, with_logprobs=with_logprobs) for result in results], results
        )
        counted = usage(
            len(requests[0].prompt), sum(len(result.tokens) for result in results), results[0].cached_tokens
        )
        return Answer(new_id("chatcmpl"), "chat.completion", now(), answered, choices, counted)


def _choice(model: ServedModel, result: Completed, *, with_logprobs: bool) -> ChatChoice:
    return ChatChoice(
        index=result.index,
        message=ChatMessageOut(result.text),
        finish_reason=finish_word(model, result.finish),
        logprobs=chat_logprobs(model.text, result.tokens, result.logprobs) if with_logprobs else None,
        stop_reason=stop_reason(result.finish, result.stop),
    )


def _max_tokens(model: ServedModel, body: ChatBody, num_prompt: int) -> int:
    room = room_for_output(model, num_prompt, param="messages")
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked is None:
        default = model.text.sampling.max_tokens
        return room if default is None else min(room, default)
    if asked < 1:
        raise InvalidRequest(f"{param} must be >= 1, got {asked}", model=model.name, param=param)
    check_output(model, num_prompt, asked, param=param)
    return asked


def _logprobs(model: ServedModel, body: ChatBody) -> LogprobParams:
    check_logprobs(model, "top_logprobs", body.top_logprobs)
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return LogprobParams()
    return LogprobParams(generated=body.top_logprobs or 0)


def _shape(model: ServedModel) -> ChunkShape:
    def logprobs(delta: Delta) -> bytes:
        return encode(chat_logprobs(model.text, delta.tokens, delta.logprobs))

    def opening(delta: Delta) -> bytes:
        return (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % delta.index
        )

    return ChunkShape(b'"delta":{"content":', b"}", logprobs, opening)
