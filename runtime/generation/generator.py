"""Runs sequences in the engine and turns their tokens into deltas of typed parts.

Leaving an iterator (aclose, cancellation, an error) frees its rows in the engine at the next step.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from runtime.errors import InvalidRequest, Overloaded, RepertoryError, Unavailable, from_code
from runtime.generation.merge import close, merge
from runtime.generation.parser import MakeParser, plain_text
from runtime.generation.parts import Completed, Delta, join
from runtime.generation.sequence import RunningSequence
from runtime.interfaces import ServedModel, TokenEngine
from runtime.ipc.messages import RowTokens
from runtime.observability.metrics import RuntimeMetrics
from runtime.observability.request_record import RequestRecord
from runtime.types import FinishReason, GenerationRequest

# An idle engine always has time to answer with a first token: without one, a sequence outlives its time limit by this much.
FIRST_TOKEN_GRACE_S = 0.25


class Generator:
    """Text generation for all APIs of this process; one instance counts all their sequences against a model's limit."""

    def __init__(self, engine: TokenEngine, metrics: RuntimeMetrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._in_flight: dict[str, int] = {}

    async def stream(
        self, model: ServedModel, requests: Sequence[GenerationRequest], make_parser: MakeParser = plain_text
    ) -> AsyncIterator[Delta]:
        """Yield the deltas of all sequences in order of arrival. Each sequence ends with a delta that has a Finish.

        `make_parser` makes the parser that splits one sequence's text into parts.
        Raises InvalidRequest, Overloaded, ModelNotFound, Unavailable or EngineFault; all sequences are then ended.
        """
        self._enter(model, len(requests))
        try:
            runs = [self._run(model, request, make_parser) for request in requests]
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

    async def complete(
        self, model: ServedModel, requests: Sequence[GenerationRequest], make_parser: MakeParser = plain_text
    ) -> list[Completed]:
        """Run all sequences to their end and return them in the order of `requests`. Raises like `stream`."""
        found: dict[int, list[Delta]] = {request.index: [] for request in requests}
        deltas = self.stream(model, requests, make_parser)
        try:
            async for delta in deltas:
                found[delta.index].append(delta)
        finally:
            await close(deltas)
        return [join(found[request.index]) for request in requests]

    async def embed(self, model: ServedModel, requests: Sequence[GenerationRequest]) -> list[bytes]:
        """Return the vector of each request, which all ask for `pooling`, as float32 values. Raises like `stream`."""
        self._enter(model, len(requests))
        tasks = [asyncio.ensure_future(self._vector(model, request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        except RepertoryError as error:
            error.model = model.name
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their rows are freed when they have ended
            self._leave(model, len(requests))

    async def _vector(self, model: ServedModel, request: GenerationRequest) -> bytes:
        observer = self._metrics.of(model.name).start(len(request.prompt))
        rows = self._engine.generate(model.model_id, request)
        finish: FinishReason | None = None
        try:
            async for row in rows:
                if row.error_code is not None or row.finish is FinishReason.ERROR:
                    raise from_code(row.error_code or "INTERNAL", row.error or "the engine failed")
                if row.vector is not None:
                    finish = row.finish
                    return row.vector
            raise Unavailable("it was unloaded, or the runtime stopped, before the vector was complete")
        finally:
            observer.end(finish)
            await close(rows)

    async def _run(
        self, model: ServedModel, request: GenerationRequest, make_parser: MakeParser
    ) -> AsyncIterator[Delta]:
        skips = request.skip_special_tokens
        sequence = RunningSequence(
            request,
            model.text.detokenizer(request.prompt, skip_special_tokens=skips, show_markers=request.show_markers),
            make_parser(request),
            model.text.special_tokens(request.stop_strings) if skips else {},
        )
        observer = self._metrics.of(model.name).start(len(request.prompt), guided=request.grammar is not None)
        record = RequestRecord.current()
        record.model = model.name
        record.prompt_tokens += len(request.prompt)
        rows = self._engine.generate(model.model_id, request)
        timed = rows if request.deadline_s is None else _until(rows, request.deadline_s)
        try:
            async for row in timed:
                if row.error_code is not None or row.finish is FinishReason.ERROR:
                    error = from_code(
                        row.error_code or "INTERNAL", row.error or "the engine failed", retry_after_s=row.retry_after_s
                    )
                    if isinstance(error, InvalidRequest) and request.grammar is not None:
                        error.param = request.grammar.param or None
                    raise error
                before = sequence.num_generated
                deltas = sequence.push(row)
                num_new = sequence.num_generated - before
                observer.tokens(num_new, time.monotonic(), row)
                record.take(num_new, row.queue_s)
                for delta in deltas:
                    yield delta
                if sequence.finish is not None:
                    return
            raise Unavailable("the engine ended a sequence without a reason")
        finally:
            observer.agent(sequence.num_calls, sequence.num_reasoning)
            observer.end(sequence.finish.reason if sequence.finish is not None else None)
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
    """Yield the rows that come before the deadline, then one with finish TIME_LIMIT."""
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
