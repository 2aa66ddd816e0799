"""Runs the workers of a pod in this process: they cost no start, and speak to the pod over the same link."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.pod.worker import Worker
from mesh.pod.worker_process import RunningWorker
from mesh.workers.link import Link
from mesh.workers.messages import Start, ToControl, ToWorker
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.short_directory import short_directory
from tests.support.waiting import until


async def start_worker_here() -> RunningWorker:
    """Start a worker as a task of this event loop."""
    ours, theirs = socket.socketpair()
    link: Link[ToWorker] = await Link.over(theirs, ToWorker)
    running = asyncio.create_task(_run(link))

    async def wait() -> int:
        await asyncio.wait((running,))
        return 0 if running.cancelled() or running.exception() is None else 1

    def kill() -> None:
        running.cancel()

    return RunningWorker(await Link.over(ours, ToControl), kill, wait)


async def _run(link: Link[ToWorker]) -> None:
    start = await anext(link.messages())
    assert isinstance(start, Start)
    await Worker(link, start).run()


@asynccontextmanager
async def running_worker_pod(
    directory: Path, *, switches: Switches | None = None, **settings: Any
) -> AsyncIterator[RunningPod]:
    """Run a pod of `running_pod` whose callers two workers serve."""
    with short_directory() as shared:
        chosen: dict[str, Any] = {"start_worker": start_worker_here, "workers": 2, "envoy_dir": str(shared), **settings}
        async with running_pod(directory, switches=switches, **chosen) as pod:
            await until(lambda: pod.pod.is_front_connected)
            yield pod
