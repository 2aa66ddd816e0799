"""Runs sequences in the engine and turns their tokens into text. Knows no API and no wire format.

Leaving an iterator (aclose, cancellation, an error) frees its rows in the engine at the next step.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from runtime.errors import Overloaded, RepertoryError, Unavailable, from_code
from runtime.generation.limits import check_prompt
from runtime.generation.merge import close, merge
from runtime.generation.request import Completed, Delta, put_together
from runtime.generation.sequence import RunningSequence, split_tokens
from runtime.interfaces import ServedModel, TokenEngine
from runtime.ipc.messages import RowTokens
from runtime.observability.metrics import RuntimeMetrics
from runtime.types import FinishReason, GenerationRequest

FIRST_TOKEN_GRACE_S = (
    0.25  # past the time limit a sequence without a token gets so much longer: an idle engine always answers with one
)


class Generator:
    """The engine with text around it. One a process."""

    def __init__(self, engine: TokenEngine, metrics: RuntimeMetrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._in_flight: dict[str, int] = {}

    async def stream(self, model: ServedModel, requests: Sequence[GenerationRequest]) -> AsyncIterator[Delta]:
        """Deltas of all sequences in order of arrival; each sequence ends with one that has `finish`.

        A delta without text comes only as a sequence's first or last, or when details were asked.
        Raises InvalidRequest, Overloaded, ModelNotFound, Unavailable, EngineFault; then all sequences are ended.
        """
        for prompt in {id(request.prompt): request.prompt for request in requests}.values():
            check_prompt(model, prompt)
        self._enter(model, len(requests))
        try:
            runs = [self._run(model, request) for request in requests]
            deltas = runs[0] if len(runs) == 1 else merge(runs)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                await close(deltas)
        except RepertoryError as error:
            error.model = model.name  # the engine knows the model's id only
            raise
        finally:
            self._leave(model, len(requests))

    async def complete(self, model: ServedModel, requests: Sequence[GenerationRequest]) -> list[Completed]:
        """All sequences to their end, in the requests' order."""
        parts: dict[int, list[Delta]] = {request.index: [] for request in requests}
        deltas = self.stream(model, requests)
        try:
            async for delta in deltas:
                parts[delta.index].append(delta)
        finally:
            await close(deltas)
        return [put_together(parts[request.index]) for request in requests]

    async def _run(self, model: ServedModel, request: GenerationRequest) -> AsyncIterator[Delta]:
        skips = request.skip_special_tokens
        unseen_stops = model.text.special_tokens(request.stop_strings) if skips else {}
        sequence = RunningSequence(
            request, model.text.detokenizer(request.prompt, skip_special_tokens=skips), unseen_stops
        )
        observer = self._metrics.of(model.name).start(len(request.prompt))
        rows = self._engine.generate(model.model_id, request)
        timed = rows if request.deadline_s is None else _until(rows, request.deadline_s)
        finish: FinishReason | None = None
        silent: tuple[int, ...] = ()  # tokens whose text is still held back
        try:
            async for row in timed:
                if row.error_code is not None or row.finish is FinishReason.ERROR:
                    raise from_code(row.error_code or "INTERNAL", row.error or "the engine failed")
                if row.finish is FinishReason.TIME_LIMIT:
                    finish = row.finish
                    yield sequence.end(finish, silent)
                    return
                for part in split_tokens(row) if request.one_token_deltas else (row,):
                    first = sequence.num_generated == 0
                    delta = sequence.push(part)
                    observer.tokens(len(delta.tokens), time.monotonic(), row)
                    finish = delta.finish
                    if delta.text or first or finish is not None or request.with_details or request.one_token_deltas:
                        if silent:
                            delta, silent = msgspec.structs.replace(delta, tokens=silent + delta.tokens), ()
                        yield delta
                    else:
                        silent += delta.tokens
                    if finish is not None:
                        return
            raise Unavailable("the engine ended a sequence without a reason")
        finally:
            observer.end(finish)
            await close(timed)

    def _enter(self, model: ServedModel, count: int) -> None:
        running = self._in_flight.get(model.model_id, 0)
        limit = model.settings.max_concurrency
        if limit is not None and running + count > limit:
            raise Overloaded(
                f"{running} sequences are running or waiting and {count} more are asked for; its limit is {limit}",
                model=model.name,
                limit=limit,
                value=running + count,
                retry_after_s=1.0,
            )
        self._in_flight[model.model_id] = running + count

    def _leave(self, model: ServedModel, count: int) -> None:
        left = self._in_flight[model.model_id] - count
        if left:
            self._in_flight[model.model_id] = left
        else:
            del self._in_flight[model.model_id]


async def _until(rows: AsyncIterator[RowTokens], deadline_s: float) -> AsyncIterator[RowTokens]:
    """The rows that come before the deadline, then one with finish TIME_LIMIT."""
    any_token = False
    try:
        while True:
            limit_s = (
                deadline_s if any_token else max(deadline_s, asyncio.get_running_loop().time()) + FIRST_TOKEN_GRACE_S
            )
            try:
                async with asyncio.timeout_at(limit_s):
                    row = await anext(rows)
            except TimeoutError:
                break
            except StopAsyncIteration:
                return
            yield row
            if row.finish is not None:
                return
            any_token = any_token or bool(row.tokens)
            if any_token and asyncio.get_running_loop().time() >= deadline_s:
                break
        yield RowTokens(0, (), FinishReason.TIME_LIMIT)
    finally:
        await close(rows)
