"""Buffers each sequence's rows in the front process until its consumer takes them, and limits how often a consumer is woken."""

import asyncio
import math
from collections.abc import Sequence

import msgspec

from runtime.errors import RepertoryError, Unavailable, from_code
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.types import FinishReason


def merge_rows(rows: Sequence[RowTokens]) -> RowTokens:
    """Merge consecutive rows of one sequence into one row."""
    if len(rows) == 1:
        return rows[0]
    last = rows[-1]
    tokens = tuple(token for row in rows for token in row.tokens)
    logprobs: tuple[TokenLogprobs, ...] | None = None
    if any(row.logprobs is not None for row in rows):
        logprobs = tuple(entry for row in rows for entry in row.logprobs or ())
    prompt_logprobs = next((row.prompt_logprobs for row in rows if row.prompt_logprobs is not None), None)
    cached_tokens = next((row.cached_tokens for row in rows if row.cached_tokens is not None), None)
    return msgspec.structs.replace(
        last,
        tokens=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        cached_tokens=cached_tokens,
        queue_s=next((row.queue_s for row in rows if row.queue_s is not None), None),
    )


class RowStream:
    """The rows of one sequence, with one producer and one consumer on the event loop.

    `event_s`: the time that sending one event of this sequence takes. DeliveryPacer uses it and `woken_s`.
    """

    __slots__ = ("_error", "_items", "_loop", "_waiter", "event_s", "model_id", "woken_s")

    def __init__(self, model_id: str, event_s: float = 0.0) -> None:
        self.model_id = model_id
        self.event_s = event_s
        self.woken_s = -math.inf
        self._loop = asyncio.get_running_loop()  # Looking the loop up is a system call before Python 3.12.
        self._items: list[RowTokens] = []
        self._error: RepertoryError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, row: RowTokens) -> None:
        self._items.append(row)
        self._wake()

    def hold(self, row: RowTokens) -> None:
        """Add a row without waking the consumer; a later `put` or `wake` does so."""
        self._items.append(row)

    def wake(self) -> bool:
        """Wake the consumer for the rows that are held. Return False if there are none."""
        if not self._items:
            return False
        self._wake()
        return True

    def fail(self, error: RepertoryError) -> None:
        """End the stream with `error`, after the rows that have arrived."""
        self._error = error
        self._wake()

    async def take(self) -> RowTokens:
        """Wait for a row, and return all rows since the last call merged into one. Raises the error given to `fail`."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return merge_rows(items)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class DeliveryPacer:
    """Wakes each consumer at most once in the time that sending one event of every open sequence takes.

    Below that rate each step's token is sent by itself. Above it the processes that send events fall behind, and new requests would
    wait behind full buffers. The first row of a sequence and its end are never held.
    """

    MAX_SPACING_S = 0.05

    def __init__(self) -> None:
        self._round_s = 0.0
        self._held: list[RowStream] = []

    def opened(self, stream: RowStream) -> None:
        self._round_s += stream.event_s

    def closed(self, stream: RowStream) -> None:
        self._round_s -= stream.event_s

    def deliver(self, stream: RowStream, row: RowTokens, now_s: float) -> None:
        spacing_s = min(self._round_s, self.MAX_SPACING_S)
        if now_s - stream.woken_s >= spacing_s or row.finish is not None:
            stream.woken_s = now_s
            stream.put(row)
            return
        stream.hold(row)
        if not self._held:
            # Usually the next row arrives before this. Without the timer a row would be held while other models have their turn.
            asyncio.get_running_loop().call_later(spacing_s, self._wake_held)
        self._held.append(stream)

    def _wake_held(self) -> None:
        held, self._held = self._held, []
        now_s = asyncio.get_running_loop().time()
        for stream in held:
            if stream.wake():
                stream.woken_s = now_s


def end_error(model_id: str, row: RowTokens) -> RepertoryError:
    """Return the error of a stream that ended with `row`."""
    if row.finish is FinishReason.ABORTED:
        return Unavailable("it was unloaded while the request ran", model=model_id)
    text = row.error or "the engine gave up the request"
    return from_code(row.error_code or "INTERNAL", text, model=model_id, retry_after_s=row.retry_after_s)
