"""A pod's endless tasks: one that fails ends the pod."""

import asyncio
import logging
from pathlib import Path

import pytest

from common.background_tasks import BackgroundTasks
from mesh.placement.reaper import Reaper
from tests.support.pods import running_pod


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
    assert "_work failed, so this pod ends: KeyError('lost')" in caplog.text
    await tasks.cancel()


async def test_background_tasks_that_are_cancelled_have_not_failed() -> None:
    tasks = BackgroundTasks()
    tasks.start(asyncio.sleep(3600))
    await tasks.cancel()
    assert not tasks.failed.is_set()


async def test_pod_fails_with_one_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(reaper: Reaper) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(Reaper, "run", run)
    async with running_pod(tmp_path / "pod", wait=False) as pod, asyncio.timeout(5):
        await pod.pod.failed.wait()
