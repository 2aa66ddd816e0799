"""Measures how soon Envoy carries the calls of a model that has been loaded, in a mesh with many loaded models.

Two pods with an Envoy each, over a real etcd. The first one has all the models. A model of it is unloaded and loaded again. The time runs from the
moment when the runtime has the model to the first answer that came past every mesh, for the Envoy of each pod. The CPU time of the pods' meshes is
that from the load's begin to these answers; it does not depend on other work on the machine.
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import uvloop

from bench.fleet import METHOD, MODEL_BYTES, register
from bench.load import quantile
from bench.processes import cpu_seconds
from mesh.client.admin import AdminClient
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import FakeRuntime, Switches
from tests.support.mesh_process import MeshProcess, mesh_process
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

ASKED_S = 0.1
_POLL_S = 0.0005
_PAUSE_S = 0.5
_PROBE_S = 0.002
_GIVE_UP_S = 30.0
_CONCURRENT_LOADS = 16
_OF_A_MESH = "x-request-id"  # each mesh on the way sends one, and Envoy none


@dataclass(frozen=True, slots=True)
class _Pods:
    """Two pods. `runtime` is that of the first one, which has all the models."""

    processes: Sequence[MeshProcess]
    runtime: FakeRuntime


@dataclass(slots=True)
class _Seen:
    """What one pod has shown. `cpu_s`: of its mesh, over all changes."""

    times_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0


def run(num_models: int, num_changes: int) -> None:
    """Print a row for each pod."""
    found = uvloop.run(_measure(num_models, num_changes))
    print("\n| change | seen by Envoy of | p50 ms | p99 ms | longest ms | mesh CPU ms | asked met |")
    print("| --- | --- | --: | --: | --: | --: | --- |")
    for pod, seen in found.items():
        p50, p99 = statistics.median(seen.times_s), quantile(seen.times_s, 0.99)
        cells = [f"{figure * 1e3:.0f}" for figure in (p50, p99, max(seen.times_s), seen.cpu_s / len(seen.times_s))]
        is_met = "yes" if p99 <= ASKED_S else "no"
        print(f"| 1 of {num_models:,} models loaded | {pod} | {' | '.join(cells)} | {is_met} |", flush=True)


async def _measure(num_models: int, num_changes: int) -> dict[str, _Seen]:
    names = [f"org/model-{number}" for number in range(num_models)]
    found = {"the copy's pod": _Seen(), "another pod": _Seen()}
    async with contextlib.AsyncExitStack() as parts:
        pods = await parts.enter_async_context(_pods(num_models))
        channels = [
            await parts.enter_async_context(grpc.aio.insecure_channel(pod.grpc_address)) for pod in pods.processes
        ]
        await register(pods.processes[0], names)
        await _load(channels[0], names)
        for name in names[:num_changes]:
            await asyncio.to_thread(AdminClient(pods.processes[0].url).unload, name)
            await _until_absent(pods.runtime, name)
            await asyncio.sleep(_PAUSE_S)
            cpu_s = [_mesh_cpu_s(pod) for pod in pods.processes]
            loading = asyncio.create_task(_load(channels[0], [name]))
            while name not in pods.runtime.loaded:  # noqa: ASYNC110 - the runtime's table, without a signal
                await asyncio.sleep(_POLL_S)
            loaded_s = time.monotonic()
            ends_s = await asyncio.gather(*(_first_carried(pods.runtime, channel, name) for channel in channels))
            await loading
            for seen, pod, end_s, before_s in zip(found.values(), pods.processes, ends_s, cpu_s, strict=True):
                seen.times_s.append(end_s - loaded_s)
                seen.cpu_s += _mesh_cpu_s(pod) - before_s
    return found


def _mesh_cpu_s(pod: MeshProcess) -> float:
    """Return the CPU time that a pod's mesh has used, without that of its Envoy."""
    assert pod.process is not None
    return cpu_seconds(pod.process.pid).by_part["mesh"]


@contextlib.asynccontextmanager
async def _pods(num_models: int) -> AsyncIterator[_Pods]:
    async with contextlib.AsyncExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        etcd = EtcdServer(folder)
        parts.callback(etcd.kill)
        await asyncio.to_thread(etcd.start)
        processes, runtimes = [], []
        # The second pod has room for no model.
        for number, capacity_bytes in enumerate(((num_models + 2) * MODEL_BYTES, MODEL_BYTES // 2)):
            home = folder / f"pod{number}"
            home.mkdir()
            switches = Switches(
                capacity_bytes=capacity_bytes, default_size_bytes=MODEL_BYTES, loading_concurrency=_CONCURRENT_LOADS
            )
            runtime = FakeRuntime(home, switches=switches)
            await runtime.start()
            parts.push_async_callback(runtime.stop)
            runtimes.append(runtime)
            process = mesh_process(
                home,
                f"pod{number}",
                store=etcd.url,
                runtime_grpc=runtime.grpc_address,
                runtime_http=runtime.http_address,
                log_requests=False,
                envoy="auto",
                envoy_dir=f"{home}/envoy",
            )
            processes.append(parts.enter_context(process))
        for each in processes:
            await asyncio.to_thread(each.wait_ready)
        yield _Pods(processes, runtimes[0])


async def _load(channel: grpc.aio.Channel, names: Sequence[str]) -> None:
    stub, free = ModelMeshStub(channel), asyncio.Semaphore(_CONCURRENT_LOADS)

    async def load(name: str) -> None:
        async with free:
            await stub.ensureLoaded(pb.EnsureLoadedRequest(modelId=name, sync=True))

    await asyncio.gather(*map(load, names))


async def _until_absent(runtime: FakeRuntime, name: str) -> None:
    async with asyncio.timeout(_GIVE_UP_S):
        while name in runtime.loaded:  # noqa: ASYNC110 - the runtime's table, without a signal
            await asyncio.sleep(_PROBE_S)


async def _first_carried(runtime: FakeRuntime, channel: grpc.aio.Channel, name: str) -> float:
    """Call the model until a call has passed every mesh, and return the time of its answer."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
    async with asyncio.timeout(_GIVE_UP_S):
        while True:
            mark = str(time.monotonic_ns())
            await call(b"", metadata=(("mm-model-id", name), ("mark", mark)))
            answered_s = time.monotonic()
            seen = next(dict(known) for known in reversed(runtime.metadata) if ("mark", mark) in known)
            if _OF_A_MESH not in seen:
                return answered_s
            await asyncio.sleep(_PROBE_S)
