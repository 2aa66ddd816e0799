"""`serve-mesh --envoy` as a person runs it: Envoy and the mesh as two processes over a runtime that computes nothing."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import psutil
import pytest

from mesh.cli.main import main
from mesh.cli.serve_envoy import num_threads
from mesh.client.admin import AdminClient
from mesh.config.schema import MeshConfig
from tests.support.short_directory import short_directory
from tests.support.stack import Mesh, free_port, load_and_wait, program, wait_ready
from tests.support.waiting import until, until_async

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    """A mesh with an Envoy in front, and one loaded model."""
    grpc_address, http_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    log = tmp_path / "log"
    with short_directory() as shared, program("bench.idle_runtime", str(tmp_path), log=log):
        settings = {
            "grpc_listen": grpc_address,
            "http_listen": http_address,
            "store": f"embedded:{tmp_path}/registry",
            "runtime_grpc": f"unix:{tmp_path}/runtime.sock",
            "runtime_http": f"unix:{tmp_path}/http.sock",
            "envoy_dir": str(shared),
            "grace_s": 5.0,
        }
        (tmp_path / "mesh.json").write_text(json.dumps(settings))
        with program("mesh", "serve-mesh", "--config", f"{tmp_path}/mesh.json", "--envoy", log=log) as process:
            wait_ready(process, f"http://{http_address}/readyz", log)
            found = Mesh(f"http://{http_address}", grpc_address, AdminClient(f"http://{http_address}"), process.pid)
            load_and_wait(found, "m", "/m")
            yield found


def child(mesh: Mesh, word: str) -> psutil.Process:
    return next(found for found in psutil.Process(mesh.pid).children() if word in " ".join(found.cmdline()))


class Load:
    """Calls a model by both protocols until it is stopped, and counts the outcomes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.outcomes: Counter[str] = Counter()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._mesh.grpc) as channel, aiohttp.ClientSession() as http:
            echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
            await asyncio.gather(*(self._call(echo, http) for _ in range(4)))

    def stop(self) -> None:
        self._stopping.set()

    async def _call(self, echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], http: aiohttp.ClientSession) -> None:
        while not self._stopping.is_set():
            try:
                await echo(b"hi", metadata=FOR_M, timeout=20)
                self.outcomes["grpc OK"] += 1
                async with http.post(f"{self._mesh.url}/v1/completions", json={"model": "m"}) as answer:
                    self.outcomes[f"http {answer.status}"] += 1
            except grpc.aio.AioRpcError as error:
                self.outcomes[f"grpc {error.code().name} {error.details()}"] += 1
            await asyncio.sleep(0.002)


async def test_envoy_goes_on_while_the_mesh_is_killed_and_started_again(mesh: Mesh) -> None:
    load = Load(mesh)
    running = asyncio.create_task(load.run())
    await until_async(lambda: _is_carried(mesh), timeout_s=30)
    envoy, killed = child(mesh, "envoy.json"), child(mesh, "mesh.pod")
    killed.send_signal(signal.SIGKILL)
    during = load.outcomes["http 200"]
    await until(lambda: load.outcomes["http 200"] > during + 50, timeout_s=30)
    await until(lambda: any("mesh.pod" in " ".join(found.cmdline()) for found in psutil.Process(mesh.pid).children()))
    await until_async(lambda: _is_ready(mesh), timeout_s=40)
    after = load.outcomes["http 200"]
    await until(lambda: load.outcomes["http 200"] > after + 50, timeout_s=30)
    load.stop()
    await running
    assert set(load.outcomes) == {"grpc OK", "http 200"}, load.outcomes
    assert envoy.is_running()


async def _is_carried(mesh: Mesh) -> bool:
    async with aiohttp.ClientSession() as http, http.get(f"{mesh.url}/metrics") as answer:
        text = await answer.text()
    return all(f'repertory_mesh_carried_requests_total{{carrier="{carrier}"' in text for carrier in ("grpc", "http"))


async def _is_ready(mesh: Mesh) -> bool:
    async with aiohttp.ClientSession() as http, http.get(f"{mesh.url}/readyz") as answer:
        return answer.status == 200


async def test_envoy_that_was_killed_is_started_again_with_its_clusters(mesh: Mesh) -> None:
    child(mesh, "envoy.json").kill()
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
        assert await echo(b"hi", metadata=FOR_M, timeout=20, wait_for_ready=True) == b"hi"


async def test_running_calls_end_before_the_processes_do(mesh: Mesh) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/test.Any/Echo")(metadata=FOR_M)
        await call.write(b"1")
        assert await call.read() == b"1"
        os.kill(mesh.pid, signal.SIGTERM)
        await until(lambda: not _listens(mesh.grpc))
        await call.write(b"2")
        assert await call.read() == b"2"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    await asyncio.to_thread(psutil.Process(mesh.pid).wait, 20)


def _listens(address: str) -> bool:
    try:
        return any(
            connection.laddr.port == int(address.rpartition(":")[2])
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr
        )
    except psutil.Error:
        return False


def test_num_threads_follows_the_cores_up_to_a_bound_or_the_setting() -> None:
    assert [num_threads(MeshConfig(), cores) for cores in (1, 12, 128)] == [1, 12, 16]
    assert [num_threads(MeshConfig(envoy_threads=3), cores) for cores in (1, 128)] == [3, 3]


def test_serve_mesh_names_an_envoy_that_it_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        ["serve-mesh", "--store", f"embedded:{tmp_path}", "--envoy-dir", str(tmp_path / "e"), "--envoy=/none"]
    )
    assert status == 2
    assert "envoy /none cannot be run" in capsys.readouterr().err


def test_serve_mesh_says_that_envoy_needs_a_port(tmp_path: Path) -> None:
    words = [
        "--store",
        f"embedded:{tmp_path}",
        "--envoy-dir",
        str(tmp_path / "e"),
        "--envoy",
        "--grpc-listen=127.0.0.1:0",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "mesh", "serve-mesh", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, "give a number instead of 0" in run.stderr) == (2, True), run.stderr
