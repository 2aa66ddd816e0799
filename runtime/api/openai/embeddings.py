"""POST /v1/embeddings: vectors of texts from models that were trained for it."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from runtime.api.openai.completions_plan import separate_prompts
from runtime.api.openai.context import json_response, model_of, read_body
from runtime.api.tokenization import encode_last, encode_texts
from runtime.errors import InvalidRequest
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count, check_prompt, check_token_ids
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.text.embedding import Embedding
from runtime.text.embedding_layers import Array, Layer, normalize
from runtime.types import GenerationRequest, SamplingParams, StopParams

_FORMATS = ("float", "base64")
_NOTHING = StopParams(0)
_GREEDY = SamplingParams(temperature=0.0)


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """`input` has the forms of a completion's prompt. `truncate_prompt_tokens` keeps the last tokens of each text.

    `prompt_name`: which of the checkpoint's prompts stands before each text.
    """

    model: str = ""
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    prompt_name: str | None = None
    priority: int | None = None
    # accepted without effect
    user: Any = None


class EmbeddingEntry(msgspec.Struct, frozen=True):
    """`embedding`: numbers, or the base64 text of little-endian float32 values."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(msgspec.Struct, frozen=True):
    model: str
    data: list[EmbeddingEntry]
    usage: EmbeddingsUsage
    object: str = "list"


class Embeddings:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.Response:
        parsed = await read_body(request, EmbeddingsBody)
        body = parsed.body
        model = model_of(request, self._directory, body.model)
        vectors, count = await embed(model, self._generator, body)
        data = [EmbeddingEntry(index, _encoded(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
        answer = EmbeddingsAnswer(body.model or model.name, data, EmbeddingsUsage(count, count))
        return json_response(answer, parsed.warning)


async def embed(model: ServedModel, generator: Generator, body: EmbeddingsBody) -> tuple[list[Array], int]:
    """Return the vectors of a request's texts, of `dimensions` if given, and the number of prompt tokens. Raises InvalidRequest naming the field."""
    embedding = _check(model, body)
    prompts = await _prompts(model, body, _prefix(model, embedding, body))
    requests = [
        GenerationRequest(
            prompt=tuple(prompt),
            sampling=_GREEDY,
            stop=_NOTHING,
            priority=body.priority or 0,
            pooling=embedding.pooling,
            index=index,
        )
        for index, prompt in enumerate(prompts)
    ]
    pooled = np.stack([np.frombuffer(vector, "<f4") for vector in await generator.embed(model, requests)])
    vectors = await asyncio.to_thread(_applied, embedding.layers, pooled) if embedding.layers else pooled
    size = vectors.shape[1]
    if body.dimensions is not None and body.dimensions > size:
        raise InvalidRequest(
            f"dimensions must be <= {size}, got {body.dimensions}",
            model=model.name,
            param="dimensions",
            limit=size,
            value=body.dimensions,
        )
    return [shortened(vector, body.dimensions) for vector in vectors], sum(map(len, prompts))


def _applied(layers: Sequence[Layer], vectors: Array) -> Array:
    """Return the vectors after the modules that follow the pooling."""
    for layer in layers:
        vectors = layer(vectors)
    return vectors


def shortened(vector: Array, dimensions: int | None) -> Array:
    """Return the vector, or its first `dimensions` values scaled to length 1."""
    return vector if dimensions is None else normalize(vector[:dimensions])


def _encoded(vector: Array, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values


def _check(model: ServedModel, body: EmbeddingsBody) -> Embedding:
    """Return how the model makes its vectors. Raises InvalidRequest naming the field."""
    if body.encoding_format not in (None, *_FORMATS):
        raise InvalidRequest(
            f"encoding_format must be one of {', '.join(_FORMATS)}, got {body.encoding_format!r}",
            param="encoding_format",
        )
    for name, value in (("dimensions", body.dimensions), ("truncate_prompt_tokens", body.truncate_prompt_tokens)):
        if value is not None and value < 1:
            raise InvalidRequest(
                f"{name} must be >= 1, got {value}", model=model.name, param=name, limit=1, value=value
            )
    if body.priority is not None and not -(2**31) <= body.priority < 2**31:
        raise InvalidRequest(f"priority must have 32 bits, got {body.priority}", model=model.name, param="priority")
    embedding = model.text.embedding
    if embedding is None:
        raise InvalidRequest(
            "it is not an embedding model: it has no 1_Pooling/config.json; use a model that was trained for embeddings",
            model=model.name,
            param="model",
        )
    if embedding.unsupported:
        raise InvalidRequest(f"it makes no embeddings here: {embedding.unsupported}", model=model.name, param="model")
    return embedding


def _prefix(model: ServedModel, embedding: Embedding, body: EmbeddingsBody) -> str:
    """Return what stands before each text. Raises InvalidRequest for a name that the checkpoint does not have."""
    name = embedding.default_prompt if body.prompt_name is None else body.prompt_name
    if name is None:
        return ""
    if name not in embedding.prompts:
        known = ", ".join(sorted(embedding.prompts)) or "none"
        raise InvalidRequest(
            f"it has no prompt {name!r}; its prompts are: {known}", model=model.name, param="prompt_name"
        )
    return embedding.prompts[name]


async def _prompts(model: ServedModel, body: EmbeddingsBody, prefix: str) -> list[list[int]]:
    separate = separate_prompts(body.input, param="input")
    check_count(model, len(separate), param="input")
    given_texts = [given for given in separate if isinstance(given, str)]
    if body.prompt_name is not None and len(given_texts) < len(separate):
        raise InvalidRequest(
            "prompt_name needs texts: nothing can stand before token ids", model=model.name, param="prompt_name"
        )
    if "" in given_texts:
        raise InvalidRequest("input has an empty text; each needs at least one token", model=model.name, param="input")
    texts = [prefix + text for text in given_texts]
    if body.truncate_prompt_tokens is not None:
        cut = [list(found.ids) for found in await encode_last(model, texts, body.truncate_prompt_tokens)]
    else:
        check_chars(model, texts, param="input")
        cut = await encode_texts(model, texts, add_special_tokens=True)
    encoded = iter(cut)
    prompts: list[list[int]] = []
    for given in separate:
        if isinstance(given, str):
            prompt = next(encoded)
        else:
            check_token_ids(model, given, param="input")
            prompt = given[-(body.truncate_prompt_tokens or len(given)) :]
        check_prompt(model, prompt, param="input", output=0)
        prompts.append(prompt)
    return prompts
