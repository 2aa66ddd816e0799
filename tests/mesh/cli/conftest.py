"""A pod that the command line's verbs call, and a way to run them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.command_line import Say
from tests.support.pods import RunningPod, running_pod


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        monkeypatch.setenv("REPERTORY_SERVER", f"http://127.0.0.1:{running.pod.http.port}")
        yield running


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)
