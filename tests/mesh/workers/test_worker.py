"""A worker over a real link: it ends with an error when it can no longer follow its pod."""

import asyncio
import socket
from pathlib import Path

import pytest

from mesh.config.schema import MeshConfig
from mesh.envoy.plan import Carrier
from mesh.pod.worker import Worker
from mesh.workers.link import Link
from mesh.workers.messages import Listening, Start, ToControl, ToWorker
from tests.support.stack import free_port


async def test_worker_fails_when_it_cannot_follow_its_pod(tmp_path: Path) -> None:
    listen = {carrier: f"127.0.0.1:{free_port()}" for carrier in Carrier}
    control = {carrier: f"unix:{tmp_path}/{carrier}" for carrier in Carrier}
    start = Start(MeshConfig(workers=1), "pod", listen, control)
    ours, theirs = socket.socketpair()
    link: Link[ToControl] = await Link.over(ours, ToControl)
    running = asyncio.create_task(Worker(await Link.over(theirs, ToWorker), start).run())
    async with asyncio.timeout(10):
        assert await anext(link.messages()) == Listening()
        link.send(start)
        with pytest.raises(ExceptionGroup) as failed:
            await running
    assert failed.group_contains(ValueError, match="a worker is started once")
    link.close()
