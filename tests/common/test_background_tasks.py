"""The endless tasks of a process: one that fails is noted."""

import asyncio
import logging

import pytest

from common.background_tasks import BackgroundTasks, wait_for_any


async def _work(begun: asyncio.Event, error: Exception | None) -> None:
    begun.set()
    if error is not None:
        raise error


async def test_background_tasks_note_the_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    tasks, begun = BackgroundTasks(), asyncio.Event()
    tasks.start(_work(begun, None))
    await begun.wait()
    tasks.start(asyncio.sleep(3600))
    assert not tasks.failed.is_set()
    with caplog.at_level(logging.ERROR):
        tasks.start(_work(begun, KeyError("lost")))
        async with asyncio.timeout(5):
            await tasks.failed.wait()
    assert "_work failed, so this process ends: KeyError('lost')" in caplog.text
    await tasks.cancel()


async def test_background_tasks_that_are_cancelled_have_not_failed() -> None:
    tasks = BackgroundTasks()
    tasks.start(asyncio.sleep(3600))
    await tasks.cancel()
    assert not tasks.failed.is_set()


async def test_wait_for_any_ends_with_the_first_event() -> None:
    late, early = asyncio.Event(), asyncio.Event()
    waiting = asyncio.create_task(wait_for_any(late, early))
    early.set()
    async with asyncio.timeout(5):
        await waiting
    assert not late.is_set()
