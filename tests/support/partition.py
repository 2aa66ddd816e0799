"""Cuts a pod's network while it serves, in network namespaces of its own: `unshare -rn python -m tests.support.partition FOLDER`.

Pod a and etcd share a namespace, pod b has another one, and a pair of virtual interfaces joins them. The program prints a JSON object of `Findings`.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import grpc.aio

from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import FakeRuntime
from tests.support.mesh_process import MeshProcess
from tests.support.waiting import until_async
from wire.mmesh import model_mesh_pb2 as mm
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

_A, _B = "10.9.0.1", "10.9.0.2"
_TTL_S = 3.0


@dataclass(frozen=True, slots=True)
class Findings:
    """`answered_s`: how long a call took that the lost pod would have answered. `lost_readiness_s`: until that pod said that it is not ready.

    `ready_s`: until it was ready after the repair.
    """

    first: str
    answer: str
    answered_s: float
    lost_readiness_s: float
    ready_s: float


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """Make a namespace with the other end of a link, and yield the id of the process that holds it."""
    _run("ip", "link", "set", "lo", "up")
    with subprocess.Popen(["unshare", "-n", "sleep", "600"]) as holder:
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        _run("ip", "link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", str(holder.pid))
        _run("ip", "addr", "add", f"{_A}/24", "dev", "va")
        _run("ip", "link", "set", "va", "up")
        inside = ("nsenter", "-t", str(holder.pid), "-n", "ip")
        _run(*inside, "addr", "add", f"{_B}/24", "dev", "vb")
        _run(*inside, "link", "set", "vb", "up")
        _run(*inside, "link", "set", "lo", "up")
        try:
            yield holder.pid
        finally:
            holder.kill()


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


@contextlib.asynccontextmanager
async def _shared(endpoint: str) -> AsyncIterator[str]:
    """Serve etcd, which listens on loopback only, at pod a's address."""
    host, port = endpoint.rsplit(":", 1)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    async with await asyncio.start_server(serve, _A, 0) as server:
        yield f"etcd://{_A}:{server.sockets[0].getsockname()[1]}"


async def _call(channel: grpc.aio.Channel, model: str) -> str:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
    return (await call(b"hi", metadata=(("mm-model-id", model),), timeout=20)).decode()


async def observe(folder: Path) -> Findings:
    etcd = EtcdServer(folder)
    with _namespace() as pid:
        etcd.start()
        async with _shared(etcd.endpoint) as store:
            runtimes, pods = [], []
            for name, host, within in (("a", _A, ()), ("b", _B, ("nsenter", "-t", str(pid), "-n"))):
                (folder / name).mkdir()
                runtimes.append(FakeRuntime(folder / name))
                await runtimes[-1].start()
                settings = {
                    "store": store,
                    "runtime_grpc": runtimes[-1].grpc_address,
                    "runtime_http": runtimes[-1].http_address,
                    "session_ttl_s": _TTL_S,
                    "http_listen": "0.0.0.0:8080",
                    "advertise_host": host,
                }
                pods.append(MeshProcess(folder, name, f"{host}:8033", f"{host}:8080", settings, within=within))
                pods[-1].start()
            try:
                for pod in pods:
                    await asyncio.to_thread(pod.wait_ready)
                return await _cut_and_repair(pods, runtimes, ("nsenter", "-t", str(pid), "-n"))
            finally:
                for pod in pods:
                    pod.kill()
                for runtime in runtimes:
                    await runtime.stop()
                etcd.kill()


async def _until_not_ready(inside: tuple[str, ...], begun_s: float) -> float:
    """Ask the cut pod from inside its namespace, and return the seconds until it is not ready."""
    ask = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"
    while time.monotonic() - begun_s < 10 * _TTL_S:
        asking = await asyncio.create_subprocess_exec(
            *inside, sys.executable, "-c", ask, stderr=asyncio.subprocess.DEVNULL
        )
        if await asking.wait():
            break
        await asyncio.sleep(0.2)
    return time.monotonic() - begun_s


async def _loaded_by_b(channel: grpc.aio.Channel, runtime: FakeRuntime) -> str:
    """Return a model that pod b has loaded. It loads what it is asked for once its record says that it serves."""
    for number in range(100):
        model = f"m{number}"
        info = mm.ModelInfo(type="llm", path="/m")
        await ModelMeshStub(channel).registerModel(mm.RegisterModelRequest(modelId=model, modelInfo=info))
        await _call(channel, model)
        if model in runtime.loaded:
            return model
    raise RuntimeError("pod b loads nothing that it is asked for")


async def _cut_and_repair(pods: list[MeshProcess], runtimes: list[FakeRuntime], inside: tuple[str, ...]) -> Findings:
    """Take pod b's end of the link down and up. Pod a's end stays up, so that its packets vanish without an error."""
    a, b = pods
    async with grpc.aio.insecure_channel(a.grpc_address) as channel, grpc.aio.insecure_channel(b.grpc_address) as other:
        model = await _loaded_by_b(other, runtimes[1])
        first = await _call(channel, model)
        assert model not in runtimes[0].loaded
        _run(*inside, "ip", "link", "set", "vb", "down")
        begun_s = time.monotonic()
        answer = await _call(channel, model)
        answered_s = time.monotonic() - begun_s
        lost_readiness_s = await _until_not_ready(inside, begun_s)
        _run(*inside, "ip", "link", "set", "vb", "up")
        repaired_s = time.monotonic()
        await until_async(lambda: asyncio.to_thread(b.is_ready), 30)
        return Findings(first, answer, answered_s, lost_readiness_s, time.monotonic() - repaired_s)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(observe(Path(sys.argv[1]))))))
