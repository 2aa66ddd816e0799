"""Ollama's POST /api/embed and the older /api/embeddings, for models that were trained for embeddings."""

import time
from typing import Any

import msgspec
from aiohttp import web

from runtime.api.model_lookup import MODEL_ID_HEADER
from runtime.api.ollama.lookup import find_tagged
from runtime.api.openai.context import json_response, read_body
from runtime.api.openai.embeddings import EmbeddingsBody, embed
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory
from runtime.text.embedding_layers import normalize

_NANOSECONDS = 1_000_000_000


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`input`: a text or several. `truncate` has no effect: a text that exceeds the context is refused."""

    model: str = ""
    input: str | list[str]
    dimensions: int | None = None
    truncate: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class EmbedAnswer(msgspec.Struct, frozen=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int
    load_duration: int = 0


class OldEmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str = ""
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class OldEmbedAnswer(msgspec.Struct, frozen=True):
    embedding: list[float]


class Embed:
    """The handlers of both routes."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.Response:
        """Answer with vectors of length 1, as Ollama does."""
        began_s = time.perf_counter()
        parsed = await read_body(request, EmbedRequest)
        body = parsed.body
        model = find_tagged(self._directory, request.headers.get(MODEL_ID_HEADER), body.model)
        texts: list[str | int | list[int]] = [body.input] if isinstance(body.input, str) else [*body.input]
        asked = EmbeddingsBody(model=body.model, input=texts, dimensions=body.dimensions)
        vectors, num_tokens = await embed(model, self._generator, asked)
        answer = EmbedAnswer(
            body.model or model.name,
            [normalize(vector).tolist() for vector in vectors],
            int((time.perf_counter() - began_s) * _NANOSECONDS),
            num_tokens,
        )
        return json_response(answer, parsed.warning)

    async def post_old(self, request: web.Request) -> web.Response:
        """Answer with one vector as the model makes it."""
        parsed = await read_body(request, OldEmbedRequest)
        body = parsed.body
        model = find_tagged(self._directory, request.headers.get(MODEL_ID_HEADER), body.model)
        [vector], _ = await embed(model, self._generator, EmbeddingsBody(model=body.model, input=body.prompt))
        return json_response(OldEmbedAnswer(vector.tolist()), parsed.warning)
