"""POST /v1/completions: parse, plan, generate, answer."""

from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from runtime.api.grammars import guide_answer
from runtime.api.openai.chunks import EventChunks, Head, StreamUsage
from runtime.api.openai.completion_chunks import CompletionDeltas, completion_choice
from runtime.api.openai.completions_plan import Prompt, plan_completions, separate_prompts
from runtime.api.openai.context import adapted_model_of, json_response, new_id, now, read_body, run_large
from runtime.api.openai.params import truncated
from runtime.api.openai.responses import Answer, CompletionChoice, usage
from runtime.api.openai.stream import send_events
from runtime.api.openai.structured import unknown_in_format, wanted_of
from runtime.api.openai.types import CompletionBody
from runtime.api.tokenization import encode_last, encode_texts
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count, check_token_ids
from runtime.generation.merge import close
from runtime.generation.parts import Completed, Delta, Finish
from runtime.interfaces import ModelDirectory, ServedModel
from runtime.types import FinishReason, GenerationRequest


class Completions:
    """The route's handler."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        self._directory = directory
        self._generator = generator

    async def post(self, request: web.Request) -> web.StreamResponse:
        parsed = await read_body(request, CompletionBody)
        body = parsed.body
        model = adapted_model_of(request, self._directory, body)
        prompts = await _prompts(model, body)
        guide = await guide_answer(model, wanted_of(body))
        requests = guide.apply(plan_completions(model, body, prompts))
        warning = parsed.with_unknown(unknown_in_format(body.response_format)).warning_with(guide.notes)
        shown_name = body.model or model.name
        if body.stream:
            head = Head(new_id("cmpl"), "text_completion", now(), shown_name)
            counts = StreamUsage(_num_prompt(prompts), len(requests), body.n or 1, body.stream_options)
            chunks = EventChunks(model, head, counts, CompletionDeltas(model, body, prompts))
            deltas = self._generator.stream(model, requests)
            return await send_events(
                request, _without_output(deltas) if body.max_tokens == 0 else deltas, chunks, warning
            )
        return json_response(await self._answer(model, shown_name, body, prompts, requests), warning)

    async def _answer(
        self,
        model: ServedModel,
        shown_name: str,
        body: CompletionBody,
        prompts: list[Prompt],
        requests: list[GenerationRequest],
    ) -> Answer[CompletionChoice]:
        results = await self._generator.complete(model, requests)
        if body.max_tokens == 0:
            results = [_empty(result) for result in results]
        per_prompt = body.n or 1
        choices = await run_large(
            lambda: [completion_choice(model, body, prompts[result.index // per_prompt], result) for result in results],
            results,
        )
        counted = usage(
            _num_prompt(prompts),
            sum(len(result.tokens) for result in results),
            sum(result.cached_tokens for result in results[::per_prompt]),
        )
        return Answer(new_id("cmpl"), "text_completion", now(), shown_name, choices, counted)


async def _prompts(model: ServedModel, body: CompletionBody) -> list[Prompt]:
    special = body.add_special_tokens is not False
    prompts: list[Prompt] = []
    separate = separate_prompts(body.prompt)
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
        kept = truncated(model, body, full)
        if isinstance(given, str) and special and len(kept) < len(full):
            [shorter] = await encode_last(model, [given], len(kept))
            kept = list(shorter.ids)  # keeps BOS
        prompts.append(Prompt(kept, given if isinstance(given, str) and len(kept) == len(full) else None))
    return prompts


def _num_prompt(prompts: list[Prompt]) -> int:
    """Return the number of prompt tokens. A prompt counts once, however many sequences share it."""
    return sum(len(prompt.token_ids) for prompt in prompts)


def _empty(result: Completed) -> Completed:
    """Return the result as if nothing had been generated."""
    return msgspec.structs.replace(
        result, text="", tokens=(), logprobs=(), offsets=(), finish=FinishReason.LENGTH, stop=None
    )


async def _without_output(deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """Yield only each sequence's end, as if nothing had been generated."""
    firsts: dict[int, Delta] = {}
    try:
        async for delta in deltas:
            first = firsts.setdefault(delta.index, delta)
            if delta.finish is not None:
                yield Delta(
                    delta.index,
                    (Finish(FinishReason.LENGTH),),
                    (),
                    0,
                    prompt_logprobs=first.prompt_logprobs,
                    cached_tokens=first.cached_tokens,
                )
    finally:
        await close(deltas)
