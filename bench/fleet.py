"""Runs a mesh of pods as processes over a real etcd, each with a runtime that computes nothing, and calls it at a fixed rate with a ledger.

Each call carries its own number and must be answered with it. The caller spreads its calls over the pods that answer `/readyz`, as a Kubernetes
service does, and sends a call to the next pod after UNAVAILABLE.
"""

import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
import grpc.aio

from tests.support.etcd import EtcdServer
from tests.support.mesh_process import MeshProcess, freeze, mesh_process
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

MB = 1_000_000
MODEL_BYTES = 10 * MB
METHOD = "/test.Any/Echo"
_PROBE_EVERY_S = 0.5
_PROBE_TIMEOUT_S = 0.5
_LATE_S = 0.3  # a call that takes longer has waited for a load
_LOADS = re.compile(r'^repertory_mesh_loads_total\{[^}]*outcome="loaded"[^}]*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Call:
    """One line of the ledger. `code` is the final gRPC status, or WRONG for another call's answer."""

    number: int
    model: str
    sent_s: float
    seconds: float
    code: str


@dataclass
class Fleet:
    etcd: EtcdServer
    pods: list[MeshProcess]
    runtimes: "list[subprocess.Popen[bytes]]"

    def num_loads(self) -> int:
        """Return the number of successful loads of the pods that answer."""
        total = 0.0
        for pod in self.pods:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{pod.url}/metrics", timeout=2) as answer:
                total += sum(float(count) for count in _LOADS.findall(answer.read().decode()))
        return round(total)

    def freeze(self, number: int, *, with_runtime: bool) -> None:
        self.pods[number].freeze()
        if with_runtime:
            freeze(self.runtimes[number])

    def freeze_runtime(self, number: int) -> None:
        freeze(self.runtimes[number])

    def kill_runtime(self, number: int) -> None:
        self.runtimes[number].kill()

    def kill_mesh(self, number: int) -> None:
        """Kill the mesh of a pod, whose Envoy keeps running."""
        self.pods[number].kill_child("mesh.pod")

    def kill_envoy(self, number: int) -> None:
        self.pods[number].kill_child("envoy.json")

    def mute_runtime(self, number: int) -> None:
        self.runtimes[number].send_signal(signal.SIGUSR1)


@contextlib.contextmanager
def fleet(
    directory: Path, *, num_pods: int, models_per_pod: int, load_s: float, with_envoy: bool = False
) -> Iterator[Fleet]:
    """Start the processes, and return when all pods are ready. `with_envoy`: callers reach the pods through Envoy."""
    etcd = EtcdServer(directory)
    etcd.start()
    with contextlib.ExitStack() as stack:
        stack.callback(etcd.kill)
        runtimes = []
        switches = {
            "capacity_bytes": models_per_pod * MODEL_BYTES,
            "default_size_bytes": MODEL_BYTES,
            "load_s": load_s,
            "loading_concurrency": 4,
        }
        pods = []
        for number in range(num_pods):
            folder = directory / f"runtime{number}"
            folder.mkdir()
            words = [sys.executable, "-m", "bench.idle_runtime", str(folder), json.dumps(switches)]
            runtimes.append(stack.enter_context(subprocess.Popen(words)))
            stack.callback(runtimes[-1].kill)
            pods.append(
                stack.enter_context(
                    mesh_process(
                        directory,
                        f"pod{number}",
                        store=etcd.url,
                        runtime_grpc=f"unix:{folder}/runtime.sock",
                        runtime_http=f"unix:{folder}/http.sock",
                        log_requests=False,
                        envoy="auto" if with_envoy else "",
                        envoy_dir=f"{directory}/envoy{number}",
                    )
                )
            )
        for pod in pods:
            pod.wait_ready()
        yield Fleet(etcd, pods, runtimes)


@dataclass(frozen=True)
class Traffic:
    """`weights` returns the probability of each model at a time since the start."""

    models: Sequence[str]
    weights: Callable[[float], Sequence[float]]
    rate: float
    seconds: float
    deadline_s: float = 15.0
    seed: int = 0


def zipf(
    num_models: int, exponent: float, *, shuffled_every_s: float | None = None, seed: int = 0
) -> Callable[[float], Sequence[float]]:
    """Return weights by Zipf's law. With `shuffled_every_s` the models change places at random."""
    ordered = [1 / (rank + 1) ** exponent for rank in range(num_models)]

    def weights(at_s: float) -> Sequence[float]:
        if shuffled_every_s is None or at_s < shuffled_every_s:
            return ordered
        mixed = list(ordered)
        random.Random(f"{seed}/{int(at_s / shuffled_every_s)}").shuffle(mixed)
        return mixed

    return weights


@dataclass
class Caller:
    """Sends traffic to a fleet and keeps the ledger."""

    pods: Sequence[MeshProcess]
    ledger: list[Call] = field(default_factory=list)
    _ready: list[int] = field(default_factory=list)
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    async def run(self, traffic: Traffic) -> list[Call]:
        self._channels = [
            grpc.aio.insecure_channel(pod.grpc_address, (("grpc.enable_retries", 0),)) for pod in self.pods
        ]
        self._ready = list(range(len(self.pods)))
        rng = random.Random(traffic.seed)
        async with aiohttp.ClientSession() as session:
            probes = [asyncio.create_task(self._probe(session, number)) for number in range(len(self.pods))]
            started_s, calls = time.monotonic(), []
            for number in range(round(traffic.rate * traffic.seconds)):
                due_s = started_s + number / traffic.rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                model = rng.choices(traffic.models, traffic.weights(due_s - started_s))[0]
                calls.append(asyncio.create_task(self._call(number, model, due_s - started_s, traffic.deadline_s)))
            await asyncio.wait(calls, timeout=traffic.deadline_s + 5)
            for task in (*probes, *calls):
                task.cancel()
            await asyncio.gather(*probes, *calls, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        return self.ledger

    async def _probe(self, session: aiohttp.ClientSession, number: int) -> None:
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
                async with session.get(f"{self.pods[number].url}/readyz", timeout=timeout) as answer:
                    is_ready = answer.status == 200
            except (aiohttp.ClientError, TimeoutError):
                is_ready = False
            if is_ready != (number in self._ready):
                self._ready = sorted({*self._ready, number} if is_ready else set(self._ready) - {number})
            await asyncio.sleep(_PROBE_EVERY_S)

    async def _call(self, number: int, model: str, at_s: float, deadline_s: float) -> None:
        begun_s = time.monotonic()
        code, tried = "UNAVAILABLE", set[int]()
        while code == "UNAVAILABLE" and (left_s := begun_s + deadline_s - time.monotonic()) > 0:
            ready = [pod for pod in self._ready if pod not in tried] or self._ready
            if not ready or len(tried) == len(self.pods):
                break
            pod = ready[number % len(ready)]
            tried.add(pod)
            code = await self._send(pod, number, model, left_s)
        self.ledger.append(Call(number, model, at_s, time.monotonic() - begun_s, code))

    async def _send(self, pod: int, number: int, model: str, timeout_s: float) -> str:
        message = f"call {number}".encode()
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channels[pod].unary_unary(METHOD)
        try:
            answer = await call(message, metadata=(("mm-model-id", model),), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK" if answer == message else "WRONG"


async def register(pod: MeshProcess, models: Sequence[str]) -> None:
    async with grpc.aio.insecure_channel(pod.grpc_address) as channel:
        stub = ModelMeshStub(channel)
        for model in models:
            info = pb.ModelInfo(type="llm", path=f"/{model}")
            await stub.registerModel(pb.RegisterModelRequest(modelId=model, modelInfo=info))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a ledger shows. `unanswered`: calls that the ledger misses, which hung beyond their deadline."""

    num_calls: int
    codes: dict[str, int]
    unanswered: int
    late: float
    over_3s: int
    p50_s: float
    p95_s: float
    max_s: float

    @property
    def num_failed(self) -> int:
        return self.num_calls - self.codes.get("OK", 0)


def summarise(ledger: Sequence[Call], num_calls: int) -> Summary:
    seconds = sorted(call.seconds for call in ledger) or [0.0]
    percentiles = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [seconds[0]] * 99
    return Summary(
        num_calls,
        dict(Counter(call.code for call in ledger)),
        num_calls - len({call.number for call in ledger}),
        sum(call.seconds >= _LATE_S for call in ledger) / max(1, len(ledger)),
        sum(call.seconds > 3 for call in ledger),
        percentiles[49],
        percentiles[94],
        seconds[-1],
    )
