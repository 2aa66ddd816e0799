"""Compares a call through the mesh with a direct call to the runtime and with one through a byte proxy, in turns.

    python -m bench.overhead [--seconds 1.0] [--repeats 3] [--carriers http,grpc]

The runtime computes nothing, so that only transport is measured. Unary: one small request and answer. Stream: one request, 100 small events.
All processes share the machine, so only differences and ratios are meaningful. "CPU µs between" is what a message costs the process
between client and runtime; other work on the machine changes it least.
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc.aio
import psutil
import uvloop

from bench.load import quantile
from tests.support import stack

EVENTS = 100
MODEL = "overhead"
SERVICE = "fmaas.GenerationService"
_PATHS = ("direct", "bytes", "mesh")

Call = Callable[[], Awaitable[int]]  # makes one call, returns its messages


@dataclass(frozen=True, slots=True)
class Way:
    """One path to the runtime: HTTP base (or unix:PATH) and gRPC address. `pid`: the process between, if there is one."""

    http: str
    grpc: str
    pid: int | None = None

    def cpu_s(self) -> float:
        if self.pid is None:
            return 0.0
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


@dataclass(frozen=True, slots=True)
class Run:
    p50_s: float
    p99_s: float
    messages_per_s: float
    messages: int


@contextlib.contextmanager
def serve() -> Iterator[tuple[dict[str, Way], str]]:
    """The three ways, and the model's id in the runtime."""
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="repertory-overhead-")))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        http, grpc_ = stack.free_port(), stack.free_port()
        proxy = parts.enter_context(
            stack.program("bench.byte_proxy", str(http), f"{home}/http.sock", str(grpc_), f"{home}/runtime.sock")
        )
        mesh = parts.enter_context(stack.mesh(home, f"unix:{home}/runtime.sock", f"unix:{home}/http.sock"))
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        ways = {
            "direct": Way(f"unix:{home}/http.sock", f"unix:{home}/runtime.sock"),
            "bytes": Way(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_}", proxy.pid),
            "mesh": Way(mesh.url, mesh.grpc, mesh.pid),
        }
        yield ways, mesh.admin.model(MODEL).model_id


async def measure(calls: list[Call], seconds: float) -> Run:
    """Each of `calls` again and again, all beside each other."""
    took: list[float] = []
    messages = 0

    async def one(call: Call) -> None:
        nonlocal messages
        await call()
        while (start := time.perf_counter()) < end:
            count = await call()
            took.append(time.perf_counter() - start)
            messages += count

    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(one(call) for call in calls))
    return Run(quantile(took, 0.5), quantile(took, 0.99), messages / (time.perf_counter() - began), messages)


def http_call(session: aiohttp.ClientSession, base: str, headers: dict[str, str], stream: bool) -> Call:
    body = {"model": MODEL, "prompt": "x" * 32, **({"stream": True, "chunks": EVENTS - 1} if stream else {})}

    async def call() -> int:
        async with session.post(f"{base}/v1/completions", json=body, headers=headers) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise RuntimeError(data.decode())
            return data.count(b"data: ") if stream else 1

    return call


def grpc_call(channel: grpc.aio.Channel, model_id: str, stream: bool) -> Call:
    metadata = (("mm-model-id", model_id),)
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/GenerateStream")
    unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Generate")

    async def call() -> int:
        if not stream:
            await unary(b"x" * 64, metadata=metadata)
            return 1
        count = 0
        async for _ in method(str(EVENTS).encode(), metadata=metadata):
            count += 1
        return count

    return call


async def run(carrier: str, way: Way, model_id: str, stream: bool, concurrency: int, seconds: float) -> Run:
    if carrier == "grpc":
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(way.grpc, options=options) as channel:
            return await measure([grpc_call(channel, model_id, stream)] * concurrency, seconds)
    unix = way.http.startswith("unix:")
    connector = (
        aiohttp.UnixConnector(way.http.removeprefix("unix:"), limit=0) if unix else aiohttp.TCPConnector(limit=0)
    )
    async with aiohttp.ClientSession(connector=connector) as session:
        base = "http://runtime" if unix else way.http
        return await measure([http_call(session, base, {"mm-model-id": model_id}, stream)] * concurrency, seconds)


async def compare(
    ways: dict[str, Way], model_id: str, carrier: str, stream: bool, concurrency: int, seconds: float, repeats: int
) -> None:
    runs: dict[str, list[Run]] = {path: [] for path in _PATHS}
    cpu_s = dict.fromkeys(_PATHS, 0.0)
    for _ in range(repeats):
        for path in _PATHS:
            before_s = ways[path].cpu_s()
            runs[path].append(await run(carrier, ways[path], model_id, stream, concurrency, seconds))
            cpu_s[path] += ways[path].cpu_s() - before_s
    kind = f"stream of {EVENTS}" if stream else "unary"
    direct = statistics.median(each.messages_per_s for each in runs["direct"])
    least = statistics.median(each.p50_s for each in runs["direct"])
    for path in _PATHS:
        rate = statistics.median(each.messages_per_s for each in runs[path])
        p50 = statistics.median(each.p50_s for each in runs[path])
        p99 = statistics.median(each.p99_s for each in runs[path])
        more, cost = "", ""
        if path != "direct":
            more = f"{(p50 - least) * 1e3:+.2f}"
            cost = f"{1e6 * cpu_s[path] / sum(each.messages for each in runs[path]):.0f}"
        print(
            f"| {carrier} | {kind} | {concurrency} | {path} | {rate:,.0f} | {rate / direct:.2f} "
            f"| {p50 * 1e3:.2f} | {more} | {p99 * 1e3:.2f} "
            f"| {cost} |",
            flush=True,
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--carriers", default="http,grpc")
    parser.add_argument("--concurrency", default="1,32")
    args = parser.parse_args()
    print("| carrier | call | at once | path | messages/s | of direct | p50 ms | more | p99 ms | CPU µs between |")
    print("| --- | --- | --: | --- | --: | --: | --: | --: | --: | --: |")
    with serve() as (ways, model_id):
        for carrier in args.carriers.split(","):
            for stream in (False, True):
                for concurrency in args.concurrency.split(","):
                    await compare(ways, model_id, carrier, stream, int(concurrency), args.seconds, args.repeats)


if __name__ == "__main__":
    uvloop.run(main())
