"""The front's end of one sequence: a small mailbox in which items wait, merged, for a consumer that may be slow.

Knows rows; nothing of sockets or of what the tokens mean.
"""

import asyncio
from collections.abc import Sequence

from runtime.errors import RepertoryError
from runtime.messages import RowTokens, TokenLogprobs


def merge_rows(rows: Sequence[RowTokens]) -> RowTokens:
    """Items of one sequence, in order, as one item."""
    if len(rows) == 1:
        return rows[0]
    last = rows[-1]
    tokens = tuple(token for row in rows for token in row.tokens)
    logprobs: tuple[TokenLogprobs, ...] | None = None
    if any(row.logprobs is not None for row in rows):
        logprobs = tuple(entry for row in rows for entry in row.logprobs or ())
    prompt_logprobs = next((row.prompt_logprobs for row in rows if row.prompt_logprobs is not None), None)
    cached_tokens = next((row.cached_tokens for row in rows if row.cached_tokens is not None), None)
    return RowTokens(
        request_id=last.request_id,
        tokens=tokens,
        finish=last.finish,
        stop_token=last.stop_token,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        cached_tokens=cached_tokens,
        error_code=last.error_code,
        error=last.error,
        queue_s=next((row.queue_s for row in rows if row.queue_s is not None), None),
    )


class RowStream:
    """One sequence's mailbox. One producer and one consumer, both in the event loop."""

    __slots__ = ("_error", "_items", "_loop", "_waiter", "model_id")

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self._loop = asyncio.get_running_loop()   # asked for once: each time it costs a system call before Python 3.12
        self._items: list[RowTokens] = []
        self._error: RepertoryError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, row: RowTokens) -> None:
        self._items.append(row)
        self._wake()

    def fail(self, error: RepertoryError) -> None:
        """End the stream with `error`, after what has come already."""
        self._error = error
        self._wake()

    async def take(self) -> RowTokens:
        """All that has come since the last call, as one item; waits for the first. Raises the error given to `fail`."""
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
