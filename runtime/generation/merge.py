"""Merges async iterators in order of arrival, and closes iterators."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


async def close(iterator: AsyncIterator[object]) -> None:
    """Close an async generator, or any iterator that has `aclose`. The work behind it is aborted."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


async def merge(iterators: Sequence[AsyncIterator[_T]]) -> AsyncIterator[_T]:
    """Yield items as they come. Raises the first failure. All iterators are closed then, and when this generator is closed."""
    queue: asyncio.Queue[tuple[_T | None, BaseException | None, bool]] = asyncio.Queue(maxsize=2 * len(iterators))

    async def pump(iterator: AsyncIterator[_T]) -> None:
        try:
            async for item in iterator:
                await queue.put((item, None, False))
        except Exception as error:
            await queue.put((None, error, True))
        else:
            await queue.put((None, None, True))
        finally:
            await close(iterator)

    tasks = [asyncio.create_task(pump(iterator)) for iterator in iterators]
    running = len(tasks)
    try:
        while running:
            item, error, ended = await queue.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            else:
                yield item  # type: ignore[misc]  # an item of type _T: only ends carry None in its place
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
