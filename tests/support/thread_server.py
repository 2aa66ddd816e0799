"""Runs an asynchronous server in a thread of its own, for clients and test tools that block."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_thread(start: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Enter the context in an event loop of a new thread and yield what it yields."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        context = asyncio.run_coroutine_threadsafe(_enter(start), loop).result(60)
        try:
            yield context[1]
        finally:
            asyncio.run_coroutine_threadsafe(context[0].__aexit__(None, None, None), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _enter(
    start: Callable[[], AbstractAsyncContextManager[T]],
) -> tuple[AbstractAsyncContextManager[T], T]:
    context = start()
    return context, await context.__aenter__()
