"""Helpers that the handlers of OpenAI's routes share: reading a request, finding its model, rendering its chat, large responses."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from runtime.api.model_lookup import MODEL_ID_HEADER, find_adapter, find_model
from runtime.api.openai.body import Parsed, parse
from runtime.api.openai.history import chat_messages
from runtime.api.openai.responses import encode
from runtime.api.openai.types import ChatTurn, Shared
from runtime.errors import InvalidRequest
from runtime.generation.parts import Completed
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.text.chat import ChatOptions
from runtime.text.output_format import CallIds

# Work above these sizes takes more than about two milliseconds and runs in a thread, off the event loop.
_THREAD_ABOVE_TURNS = 256
_THREAD_ABOVE_VALUES = 1000

_LOG = logging.getLogger(__name__)
_Body = TypeVar("_Body", bound=msgspec.Struct)
_T = TypeVar("_T")


async def read_body(request: web.Request, kind: type[_Body]) -> Parsed[_Body]:
    parsed = parse(await request.read(), kind)
    if parsed.unknown:
        _LOG.info("unknown fields were ignored: %s", parsed.unknown_names)
    return parsed


def model_of(request: web.Request, directory: ModelDirectory, asked: str) -> ServedModel:
    """Return the model of the mesh's header, of the path where it has a name, or the one that the body asks for."""
    return find_model(directory, request.headers.get(MODEL_ID_HEADER), request.match_info.get("name") or asked)


def adapted_model_of(request: web.Request, directory: ModelDirectory, body: Shared) -> ServedModel:
    """Return the model of a completion, or the adapter of it that the body names. Raises InvalidRequest as `find_adapter`."""
    param, adapter = body.adapter
    model = model_of(request, directory, body.model or adapter)
    return find_adapter(directory, model, adapter, param, by_header=MODEL_ID_HEADER in request.headers)


def json_response(answer: msgspec.Struct, warning: str | None = None) -> web.Response:
    response = web.Response(body=encode(answer), content_type="application/json")
    if warning is not None:
        response.headers["Warning"] = warning
    return response


async def render_chat(model: ServedModel, turns: Sequence[ChatTurn], options: ChatOptions) -> str:
    """Return the prompt's text. The text parts of a message are joined, one line each. Raises NotSupported for other parts."""
    if not turns:
        raise InvalidRequest("messages is empty: it needs at least one message", param="messages")
    if len(turns) <= _THREAD_ABOVE_TURNS:
        return _render(model, turns, options)
    return await asyncio.to_thread(_render, model, turns, options)


def _render(model: ServedModel, turns: Sequence[ChatTurn], options: ChatOptions) -> str:
    output_format = model.text.output_format
    messages = chat_messages(turns, output_format.call_ids if output_format else CallIds.ANY)
    return model.text.render_chat(model.name, messages, options)


async def run_large(make: Callable[[], _T], results: Sequence[Completed]) -> _T:
    """Run `make`, in a thread if the results have many log-probabilities to encode."""
    values = sum(
        1 + len(entry.top)
        for result in results
        for entry in (*result.prompt_logprobs, *result.logprobs)
        if entry is not None
    )
    return make() if values <= _THREAD_ABOVE_VALUES else await asyncio.to_thread(make)


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(16).hex()}"


def now() -> int:
    return int(time.time())
