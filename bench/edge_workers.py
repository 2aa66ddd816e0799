"""Compares how many messages a second a mesh carries with different numbers of workers, over gRPC from Python clients.

    python -m bench.edge_workers [--workers 0,1,2] [--connections 128] [--clients 6] [--servers 4] [--seconds 3] [--turns 3]

Each connection has one call at a time. Clients and servers are processes of their own, so the machine needs a core for each of them and for each worker;
with fewer cores, the figures are those of the machine and not of the workers. The numbers of workers take turns, and figures are the turns' medians. The
busier worker's share is that of the workers' CPU time: the kernel gives each connection to one of them by a hash.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import grpc.aio
import psutil
import uvloop

from bench.edge import EVENTS, MESSAGE, MODEL, SERVICE
from tests.support import stack

UNARY, STREAM = f"/{SERVICE}/Generate", f"/{SERVICE}/GenerateStream"
METADATA = (("mm-model-id", MODEL),)
SETTLE_S = 0.5  # from the go to the first message that counts


@dataclass(frozen=True, slots=True)
class Job:
    address: str
    method: str
    connections: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """`cpu_us`: of the mesh and its workers for each message. `share`: of the busier worker in the workers' CPU time; 0 without workers."""

    messages_per_s: float
    failed: int
    cpu_us: float
    share: float


class _Server(grpc.GenericRpcHandler):
    """Answers every call at once, as its method says."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        if handler_call_details.method == UNARY:
            return grpc.unary_unary_rpc_method_handler(self._unary)
        return grpc.unary_stream_rpc_method_handler(self._stream)

    async def _unary(self, message: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return message

    async def _stream(self, message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for _ in range(EVENTS):
            await context.write(message)


async def _serve(address: str) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 1), ("grpc.max_concurrent_streams", 100_000)))
    server.add_generic_rpc_handlers((_Server(),))
    server.add_insecure_port(address)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


async def _load(job: Job) -> None:
    """Connect, wait for a line, call for the job's time, and report what came after it had settled."""
    counts = {"messages": 0, "failed": 0}
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(job.address, options=options) for _ in range(job.connections)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    begin_s = time.monotonic() + SETTLE_S
    end_s = begin_s + job.seconds

    async def caller(channel: grpc.aio.Channel) -> None:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(job.method)
        while time.monotonic() < end_s:
            try:
                async for _ in call(MESSAGE, metadata=METADATA):
                    counts["messages"] += begin_s <= time.monotonic() < end_s
            except grpc.aio.AioRpcError:
                counts["failed"] += 1

    await asyncio.gather(*map(caller, channels))
    print(json.dumps(counts), flush=True)


@contextlib.contextmanager
def _processes(*arguments: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run this module once for each list of arguments, all ready."""
    command = [sys.executable, "-m", "bench.edge_workers"]
    started = [
        subprocess.Popen([*command, *each], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for each in arguments
    ]
    try:
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a process of the benchmark did not start")
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def _mesh(server: str, workers: int) -> Iterator[stack.Mesh]:
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-edge-")))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        sockets = (f"unix:{home}/runtime.sock", f"unix:{home}/http.sock")
        mesh = parts.enter_context(
            stack.mesh(
                home,
                *sockets,
                home / "mesh.log",
                runtime_inference_grpc=server,
                workers=workers,
                envoy_dir=f"{home}/shared",
                log_requests=False,
            )
        )
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        yield mesh


def worker_pids(mesh_pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(mesh_pid).children()]


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def measure(mesh: stack.Mesh, method: str, connections: int, clients: int, seconds: float) -> Sample:
    job = Job(mesh.grpc, method, connections // clients, seconds)
    with _processes(*[["client", json.dumps(asdict(job))]] * clients) as loads:
        for load in loads:
            assert load.stdin is not None
            load.stdin.write("go\n")
            load.stdin.flush()
        time.sleep(SETTLE_S)
        pids = [mesh.pid, *worker_pids(mesh.pid)]
        before = [_cpu_s(pid) for pid in pids]
        time.sleep(seconds)
        _, *of_workers = used = [_cpu_s(pid) - cpu_s for pid, cpu_s in zip(pids, before, strict=True)]
        reports = [json.loads(load.stdout.readline()) for load in loads if load.stdout is not None]
    messages = sum(report["messages"] for report in reports)
    share = max(of_workers) / sum(of_workers) if of_workers else 0.0
    return Sample(messages / seconds, sum(report["failed"] for report in reports), 1e6 * sum(used) / messages, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="0,1,2", help="numbers of workers to compare")
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--clients", type=int, default=6, help="processes of clients, which share the connections")
    parser.add_argument("--servers", type=int, default=4, help="processes that answer")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    numbers = [int(number) for number in args.workers.split(",")]
    with contextlib.ExitStack() as parts:
        server = f"127.0.0.1:{stack.free_port()}"
        parts.enter_context(_processes(*[["server", server]] * args.servers))
        meshes = {number: parts.enter_context(_mesh(server, number)) for number in numbers}
        print("| call | workers | messages/s | of one worker's | CPU µs a message | busier worker's share | failed |")
        print("| --- | --: | --: | --: | --: | --: | --: |")
        for kind, method in (("unary", UNARY), (f"stream of {EVENTS}", STREAM)):
            samples: dict[int, list[Sample]] = {number: [] for number in numbers}
            for _ in range(args.turns):
                for number, mesh in meshes.items():
                    samples[number].append(measure(mesh, method, args.connections, args.clients, args.seconds))
            _print(kind, samples)


def _print(kind: str, samples: dict[int, list[Sample]]) -> None:
    for number, found in samples.items():
        rate, cpu_us, share = (
            statistics.median(getattr(sample, name) for sample in found)
            for name in ("messages_per_s", "cpu_us", "share")
        )
        ratio = ""
        if ones := samples.get(1):
            pairs = zip(found, ones, strict=True)
            ratio = f"{statistics.median(own.messages_per_s / one.messages_per_s for own, one in pairs):.2f}"
        failed = sum(sample.failed for sample in found)
        shown = f"{share:.2f}" if number > 1 else ""
        print(f"| {kind} | {number} | {rate:,.0f} | {ratio} | {cpu_us:.0f} | {shown} | {failed} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        uvloop.run(_serve(sys.argv[2]))
    elif sys.argv[1:2] == ["client"]:
        uvloop.run(_load(Job(**json.loads(sys.argv[2]))))
    else:
        main()
