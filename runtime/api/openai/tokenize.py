"""POST /tokenize and /detokenize, in vLLM's shapes."""

import msgspec
from aiohttp import web

from runtime.api.openai.context import json_response, model_of, read_body, render_chat
from runtime.api.openai.types import DetokenizeBody, TokenizeBody
from runtime.api.tokenization import encode_text
from runtime.errors import InvalidRequest
from runtime.generation.limits import check_token_ids
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.text.chat import ChatOptions


class TokenizeAnswer(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    prompt: str


class Tokenizing:
    """Both routes' handlers."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    async def tokenize(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, TokenizeBody)
        body = parsed.body
        model = model_of(request, self._directory, body.model)
        tokens = await self._tokens(model, body)
        names = [model.text.piece(token) for token in tokens] if body.return_token_strs else None
        return json_response(TokenizeAnswer(len(tokens), model.facts.max_model_len, tokens, names), parsed.warning)

    async def detokenize(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, DetokenizeBody)
        model = model_of(request, self._directory, parsed.body.model)
        check_token_ids(model, parsed.body.tokens, param="tokens")
        return json_response(
            DetokenizeAnswer(model.text.decode(parsed.body.tokens, skip_special_tokens=False)), parsed.warning
        )

    async def _tokens(self, model: ServedModel, body: TokenizeBody) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        if body.messages is None:
            return await encode_text(model, body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        options = ChatOptions(
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final=bool(body.continue_final_message),
            variables=body.chat_template_kwargs or {},
        )
        text = await render_chat(model, body.messages, options)
        return await encode_text(model, text, add_special_tokens=bool(body.add_special_tokens))
