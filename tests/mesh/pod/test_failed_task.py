"""A pod that lacks a part ends, so that what supervises it starts it again."""

import asyncio
from pathlib import Path

import pytest

from mesh.placement.reaper import Reaper
from tests.support.pods import running_pod


async def test_pod_fails_with_one_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(reaper: Reaper) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(Reaper, "run", run)
    async with running_pod(tmp_path / "pod", wait=False) as pod, asyncio.timeout(5):
        await pod.pod.failed.wait()
