"""Workers as processes: a killed one is replaced, and none outlives its pod."""

import os
import signal
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

from mesh.pod.worker_process import start_worker_process
from tests.support.envoy import until_carried
from tests.support.fake_runtime import FakeRuntime
from tests.support.mesh_process import mesh_process
from tests.support.short_directory import short_directory
from tests.support.waiting import until, wait_until
from tests.support.workers import running_worker_pod

FOR_M = (("mm-model-id", "m"),)


def workers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "mesh.pod.worker_process" in child.cmdline()]


async def test_killed_workers_are_replaced_and_their_calls_forgotten(tmp_path: Path) -> None:
    async with running_worker_pod(tmp_path / "pod", start_worker=start_worker_process) as pod:
        await pod.register("m")
        await until_carried(pod, "m")
        call = pod.server_stream("/test.Any/Slow")(b"go", metadata=FOR_M)
        assert await call.read() == b"first"
        await until(lambda: pod.pod.copies.in_flight("m") == 1)
        before = workers_of(os.getpid())
        assert len(before) == 2
        for worker in before:
            worker.send_signal(signal.SIGTERM)  # as service managers do: it changes nothing
        assert await pod.echo("m") == b"hi"
        for worker in before:
            assert worker.is_running()
            worker.kill()
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await call.read()
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: pod.pod.copies.in_flight("m") == 0)
        await until(lambda: pod.pod.is_front_connected)
        assert await pod.echo("m", wait_for_ready=True) == b"hi"
    assert workers_of(os.getpid()) == []


async def test_workers_end_with_their_pod(tmp_path: Path) -> None:
    runtime = FakeRuntime(tmp_path)
    await runtime.start()
    settings = {"store": f"embedded:{tmp_path}/registry", "runtime_grpc": runtime.grpc_address, "workers": 2}
    with short_directory() as shared, mesh_process(tmp_path, "pod", envoy_dir=str(shared), **settings) as pod:  # type: ignore[arg-type]
        assert pod.process is not None
        pid = pod.process.pid
        await until(lambda: len(workers_of(pid)) == 2, 60)
        workers = workers_of(pid)
        pod.kill()
        wait_until(lambda: not any(worker.is_running() for worker in workers))
    await runtime.stop()
