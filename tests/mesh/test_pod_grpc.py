"""A pod over a fake runtime: gRPC pass-through by model name."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.register("m")
        yield running


async def test_unary(pod: RunningPod) -> None:
    assert await pod.echo("m", b"payload \x00\xff") == b"payload \x00\xff"
