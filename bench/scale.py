"""Measures a large registry and one hop: `python -m bench.scale [--models 100000] [VERB …]`.

start      seconds from the start of a pod's process to ready, and its memory, with so many registered models in the embedded store
names      the same with as many names, each of which is two records
register   registrations by name a second, over HTTP, with fsync
visible    milliseconds until eight pods over one etcd see a registration
hop        a call to another pod's copy, beside a call to the pod's own
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import psutil
import uvloop

from bench.fleet import METHOD, fleet, register
from mesh.registry.models import new_model
from mesh.registry.records import ModelRecord, VModelRecord, encode_record
from mesh.registry.registration import concrete_id, model_info
from mesh.registry.registry import Registry
from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EtcdLocation, parse_store
from mesh.store.protocol import Put
from tests.support.etcd import EtcdServer
from tests.support.mesh_process import MeshProcess, mesh_process

_ROOT = "/mm/repertory"
_BATCH = 1000
_REGISTERED = 2000
_CONCURRENT = 64
_SEEN = 300
_PODS = 8
_CALLS = 3000


@contextlib.contextmanager
def _pod(folder: Path) -> Iterator[MeshProcess]:
    """Start a pod over the embedded store in the folder, with a runtime that computes nothing."""
    runtime = subprocess.Popen([sys.executable, "-m", "bench.idle_runtime", str(folder)])
    try:
        while not (folder / "runtime.sock").exists():
            time.sleep(0.01)
        with mesh_process(
            folder,
            "pod",
            store=f"embedded:{folder}/store",
            runtime_grpc=f"unix:{folder}/runtime.sock",
            runtime_http=f"unix:{folder}/http.sock",
            log_requests=False,
        ) as pod:
            yield pod
    finally:
        runtime.kill()
        runtime.wait()


def _records(number: int, *, named: bool) -> list[Put]:
    name = f"org/model-{number}"
    info = model_info(name, f"hf://{name}", {"quantize": "nf4"})
    model_id = concrete_id(name, info) if named else name
    model = new_model(info, last_used_ms=1_700_000_000_000 + number, auto_delete=named)
    if not named:
        return [Put(f"{_ROOT}/registry/{model_id}", encode_record(model))]
    record = ModelRecord(type=model.type, key=model.key, path=model.path, auto_delete=True, refs=1)
    vmodel = VModelRecord(active_id=model_id, target_id=model_id)
    return [
        Put(f"{_ROOT}/registry/{model_id}", encode_record(record)),
        Put(f"{_ROOT}/vmodels/{name}", encode_record(vmodel)),
    ]


async def _fill(folder: Path, num_models: int, *, named: bool) -> None:
    store = EmbeddedStore(folder)
    await store.open()
    for first in range(0, num_models, _BATCH):
        numbers = range(first, min(first + _BATCH, num_models))
        await store.txn([], [write for number in numbers for write in _records(number, named=named)])
    await store.close()


async def _start(num_models: int, *, named: bool) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").mkdir()
        await _fill(folder / "store", num_models, named=named)
        begun_s = time.monotonic()
        with _pod(folder) as pod:
            await asyncio.to_thread(pod.wait_ready)
            ready_s = time.monotonic() - begun_s
            assert pod.process is not None
            rss_mb = psutil.Process(pod.process.pid).memory_info().rss / 1e6
            return f"{num_models} {'names' if named else 'models'}: ready after {ready_s:.1f} s, {rss_mb:.0f} MB"


async def start(num_models: int) -> str:
    return await _start(num_models, named=False)


async def names(num_models: int) -> str:
    return await _start(num_models, named=True)


async def register_names(_: int) -> str:
    with tempfile.TemporaryDirectory() as name, _pod(Path(name)) as pod:
        await asyncio.to_thread(pod.wait_ready)
        numbers = iter(range(_REGISTERED))
        async with aiohttp.ClientSession(pod.url) as session:

            async def client() -> None:
                for number in numbers:
                    body = {"name": f"org/model-{number}", "uri": f"hf://org/model-{number}", "quantize": "nf4"}
                    async with session.post("/admin/v1/models", json=body) as answer:
                        answer.raise_for_status()

            begun_s = time.monotonic()
            await asyncio.gather(*(client() for _ in range(_CONCURRENT)))
            return f"registrations by name: {_REGISTERED / (time.monotonic() - begun_s):.0f} a second"


async def visible(_: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        etcd = EtcdServer(Path(name))
        etcd.start()
        try:
            location = parse_store(etcd.url)
            assert isinstance(location, EtcdLocation)
            stores = [EtcdStore(location, reread=lambda: location) for _ in range(_PODS)]
            registries = []
            for number, store in enumerate(stores):
                await store.open()
                registries.append(
                    Registry(
                        store,
                        root_prefix="",
                        kv_prefix="mm",
                        service_name="repertory",
                        instance_id=f"pod{number}",
                        session_ttl_s=25.0,
                        default_owner="",
                    )
                )
                await registries[-1].start()
            seconds = sorted([at_s async for at_s in _until_seen(registries)])
            for registry, store in zip(registries, stores, strict=True):
                await registry.close()
                await store.close()
        finally:
            etcd.kill()
        p99_s = seconds[int(len(seconds) * 0.99)]
        return f"visible on {_PODS} pods: p50 {statistics.median(seconds) * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms"


async def _until_seen(registries: list[Registry]) -> AsyncIterator[float]:
    for number in range(_SEEN):
        name = f"model-{number}"
        begun_s = time.monotonic()
        seen = [registry.vmodels.table.until(name, lambda record: record is not None) for registry in registries]
        waiting = asyncio.gather(*seen)
        await registries[0].register_name(name, model_info(name, "/m", {}), now_ms=1, is_loaded=lambda _: False)
        await waiting
        yield time.monotonic() - begun_s


async def _p50_s(address: str, model: str) -> float:
    seconds = []
    async with grpc.aio.insecure_channel(address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        for _ in range(_CALLS):
            begun_s = time.perf_counter()
            await call(b"hello", metadata=(("mm-model-id", model),))
            seconds.append(time.perf_counter() - begun_s)
    return statistics.median(seconds)


async def hop(_: int) -> str:
    with tempfile.TemporaryDirectory() as name, fleet(Path(name), num_pods=2, models_per_pod=4, load_s=0.0) as mesh:
        await register(mesh.pods[0], ["m"])
        addresses = [pod.grpc_address for pod in mesh.pods]
        times = [await _p50_s(address, "m") for address in addresses]
        local_s, hop_s = sorted(times)
        return f"one hop: {hop_s * 1e6:.0f} µs, local {local_s * 1e6:.0f} µs, {hop_s / local_s:.2f} times"


VERBS: Mapping[str, Callable[[int], Awaitable[str]]] = {
    "start": start,
    "names": names,
    "register": register_names,
    "visible": visible,
    "hop": hop,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("verbs", nargs="*", metavar="VERB", default=list(VERBS))
    parser.add_argument("--models", type=int, default=100_000)
    arguments = parser.parse_args()
    for verb in arguments.verbs:
        print(uvloop.run(VERBS[verb](arguments.models)), flush=True)


if __name__ == "__main__":
    main()
