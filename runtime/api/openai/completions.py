"""POST /v1/completions: text completions, with echo and prompt log-probabilities as log-likelihood evaluations need them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from aiohttp import web

from runtime.api.openai.body import refuse_unsupported
from runtime.api.openai.chunks import ChunkShape, EventChunks, Head, StreamUsage, num_prompt_tokens
from runtime.api.openai.context import json_response, model_of, new_id, now, read_body, written_out
from runtime.api.openai.params import check_logprobs, check_ranges, refuse_suffix, sequences, truncated
from runtime.api.openai.responses import (
    Answer,
    CompletionChoice,
    CompletionLogprobs,
    completion_logprobs,
    encode,
    finish_word,
    stop_reason,
    usage,
)
from runtime.api.openai.stream import send_events
from runtime.api.openai.types import CompletionBody
from runtime.api.tokenization import encode_last, encode_texts
from runtime.errors import InvalidRequest
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count, check_output, check_token_ids, room_for_output
from runtime.generation.merge import close
from runtime.generation.request import Completed, Delta
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.ipc.messages import TokenLogprobs
from runtime.types import FinishReason, GenerationRequest, LogprobParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # as the caller wrote it; None if it came as ids, or was truncated


class Completions:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, CompletionBody)
        body = parsed.body
        refuse_unsupported(body)
        refuse_suffix(body.suffix)
        model = model_of(request, self._directory, body.model)
        check_ranges(model, body)
        check_logprobs(model, "logprobs", body.logprobs)
        prompts = await self._prompts(model, body)
        limits = [_max_tokens(model, body, len(prompt.token_ids)) for prompt in prompts]
        logprobs = LogprobParams(generated=body.logprobs, prompt=body.logprobs if body.echo else None)
        token_ids = [prompt.token_ids for prompt in prompts]
        # the engine always makes a token; one that wasn't asked for is left out
        requests = sequences(model, body, token_ids, [max(1, limit) for limit in limits], logprobs)
        answered = body.model or model.name
        if body.stream:
            head = Head(new_id("cmpl"), "text_completion", now(), answered)
            counts = StreamUsage(num_prompt_tokens(token_ids), len(requests), body.n or 1, body.stream_options)
            chunks = EventChunks(model, head, counts, _shape(model, body, prompts))
            deltas = self._generator.stream(model, requests)
            return await send_events(
                request, _without_output(deltas) if body.max_tokens == 0 else deltas, chunks, parsed.warning
            )
        return json_response(await self._answer(model, answered, body, prompts, requests), parsed.warning)

    async def _prompts(self, model: ServedModel, body: CompletionBody) -> list[Prompt]:
        special = body.add_special_tokens is not False
        prompts: list[Prompt] = []
        separate = _separate(body.prompt)
        check_count(model, len(separate), body.n or 1)
        texts = [given for given in separate if isinstance(given, str)]
        if body.truncate_prompt_tokens is None:
            check_chars(model, texts)
        encoded = iter(await encode_texts(model, texts, add_special_tokens=special))
        for given in separate:
            if isinstance(given, str):
                full = next(encoded)
            else:
                check_token_ids(model, given, param="prompt")
                full = given
            kept = truncated(body, full)
            if isinstance(given, str) and special and len(kept) < len(full):
                [shorter] = await encode_last(model, [given], len(kept))
                kept = list(shorter.ids)  # BOS stays
            prompts.append(Prompt(kept, given if isinstance(given, str) and len(kept) == len(full) else None))
        return prompts

    async def _answer(
        self,
        model: ServedModel,
        answered: str,
        body: CompletionBody,
        prompts: list[Prompt],
        requests: list[GenerationRequest],
    ) -> Answer:
        results = await self._generator.complete(model, requests)
        if body.max_tokens == 0:
            results = [_empty(result) for result in results]
        per_prompt = body.n or 1
        choices = await written_out(
            lambda: [_choice(model, body, prompts[result.index // per_prompt], result) for result in results], results
        )
        counted = usage(
            sum(len(prompt.token_ids) for prompt in prompts),
            sum(len(result.tokens) for result in results),
            sum(result.cached_tokens for result in results[::per_prompt]),
        )
        return Answer(new_id("cmpl"), "text_completion", now(), answered, choices, counted)


def _separate(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty: it needs at least one prompt", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts_or_lists = [item for item in prompt if not isinstance(item, int)]
    if ids or len({type(item) for item in texts_or_lists}) > 1:
        raise InvalidRequest("prompt mixes strings, token ids and lists of token ids", param="prompt")
    return texts_or_lists


def _max_tokens(model: ServedModel, body: CompletionBody, num_prompt: int) -> int:
    room = room_for_output(model, num_prompt)
    if body.max_tokens is None:
        return min(room, model.text.sampling.max_tokens or DEFAULT_MAX_TOKENS)
    if body.max_tokens < 0:
        raise InvalidRequest(f"max_tokens must be >= 0, got {body.max_tokens}", model=model.name, param="max_tokens")
    check_output(model, num_prompt, body.max_tokens)
    return body.max_tokens


def _choice(model: ServedModel, body: CompletionBody, prompt: Prompt, result: Completed) -> CompletionChoice:
    echoed = _echo_text(model, body, prompt) if body.echo else ""
    logprobs: CompletionLogprobs | None = None
    if body.logprobs is not None:
        tokens, entries, offsets = (
            list(result.tokens),
            list[TokenLogprobs | None](result.logprobs),
            list(result.offsets),
        )
        if body.echo:
            tokens = prompt.token_ids + tokens
            entries = list(result.prompt_logprobs) + entries
            offsets = _prompt_offsets(model, body, prompt) + [len(echoed) + offset for offset in offsets]
        logprobs = completion_logprobs(model.text, tokens, entries, offsets)
    return CompletionChoice(
        result.index,
        echoed + result.text,
        finish_word(model, result.finish),
        logprobs,
        stop_reason(result.finish, result.stop),
    )


def _echo_text(model: ServedModel, body: CompletionBody, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return model.text.decode(prompt.token_ids, skip_special_tokens=body.skip_special_tokens is not False)


def _prompt_offsets(model: ServedModel, body: CompletionBody, prompt: Prompt) -> list[int]:
    """Where each token begins in the echoed text. A special token or a space that the caller wrote is in it, one that was added isn't."""
    written = prompt.text
    decoder = model.text.detokenizer(
        (), skip_special_tokens=written is not None or body.skip_special_tokens is not False
    )
    offsets: list[int] = []
    length = 0
    for token in prompt.token_ids:
        offsets.append(length)
        text = decoder.push((token,))
        if written is not None:
            if model.text.is_special(token):
                text = model.text.piece(token)
                text = text if written.startswith(text, length) else ""
            elif not written.startswith(text, length):
                text = text.removeprefix(" ")  # sentencepiece's, before a text and after each special token
        length += len(text)
    return offsets


def _empty(result: Completed) -> Completed:
    """The same result as if nothing had been generated."""
    return msgspec.structs.replace(
        result, text="", tokens=(), logprobs=(), offsets=(), finish=FinishReason.LENGTH, stop=None
    )


async def _without_output(deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """Only each sequence's end, as if nothing had been generated."""
    firsts: dict[int, Delta] = {}
    try:
        async for delta in deltas:
            first = firsts.setdefault(delta.index, delta)
            if delta.finish is not None:
                yield Delta(
                    delta.index,
                    "",
                    (),
                    0,
                    FinishReason.LENGTH,
                    prompt_logprobs=first.prompt_logprobs,
                    cached_tokens=first.cached_tokens,
                )
    finally:
        await close(deltas)


def _shape(model: ServedModel, body: CompletionBody, prompts: list[Prompt]) -> ChunkShape:
    per_prompt = body.n or 1
    echoes = [_echo_text(model, body, prompt) if body.echo else "" for prompt in prompts]

    # text offsets count on through the stream's events
    def logprobs(delta: Delta) -> bytes:
        start = len(echoes[delta.index // per_prompt])
        return encode(
            completion_logprobs(model.text, delta.tokens, delta.logprobs, [start + offset for offset in delta.offsets])
        )

    def opening(delta: Delta) -> bytes:
        if not body.echo:
            return b""
        prompt = prompts[delta.index // per_prompt]
        values = b"null"
        if delta.prompt_logprobs:
            offsets = _prompt_offsets(model, body, prompt)
            values = encode(completion_logprobs(model.text, prompt.token_ids, delta.prompt_logprobs, offsets))
        text = encode(echoes[delta.index // per_prompt])
        return b'{"index":%d,"text":' % delta.index + text + b',"logprobs":' + values + b',"finish_reason":null}'

    return ChunkShape(b'"text":', b"", logprobs, opening)
