"""Runs a mesh of pods as processes over a real etcd, each with a runtime that computes nothing, and breaks parts of it."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tests.support.etcd import EtcdServer
from tests.support.mesh_process import MeshProcess, freeze, mesh_process
from tests.support.pod_network import HUB, PodNetwork
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

MB = 1_000_000
MODEL_BYTES = 10 * MB
METHOD = "/test.Any/Echo"
_LOADS = re.compile(r'^repertory_mesh_loads_total\{[^}]*outcome="loaded"[^}]*\} (\S+)$', re.MULTILINE)


class RuntimeProcess:
    """A runtime that computes nothing, with its sockets in `folder`."""

    def __init__(self, folder: Path, switches: Mapping[str, Any]) -> None:
        self.folder = folder
        self._switches = switches
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for socket in self.folder.glob("*.sock"):
            socket.unlink()
        words = [sys.executable, "-m", "bench.idle_runtime", str(self.folder), json.dumps(self._switches)]
        self._process = subprocess.Popen(words)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        freeze(self._running)

    def thaw(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def toggle_answers(self) -> None:
        """Have inference calls hang, or be answered again. The state is reported in either case."""
        self._running.send_signal(signal.SIGUSR1)

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process


@dataclass
class Fleet:
    """`network` is None if the pods share this process's network, so that none can be cut from the others."""

    etcd: EtcdServer
    pods: list[MeshProcess]
    runtimes: list[RuntimeProcess]
    network: PodNetwork | None = None

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
            self.runtimes[number].freeze()

    def thaw(self, number: int, *, with_runtime: bool) -> None:
        if with_runtime:
            self.runtimes[number].thaw()
        self.pods[number].thaw()

    def kill_mesh(self, number: int) -> None:
        """Kill the mesh of a pod, whose Envoy keeps running."""
        self.pods[number].kill_child("mesh.pod")

    def kill_envoy(self, number: int) -> None:
        self.pods[number].kill_child("envoy.json")

    def kill(self, number: int) -> None:
        """Kill a pod with its runtime."""
        self.pods[number].kill()
        self.runtimes[number].kill()

    def leave(self, number: int) -> None:
        """End a pod as Kubernetes does, and then its runtime."""
        self.pods[number].leave()
        self.runtimes[number].kill()

    def join(self, number: int) -> None:
        """Start a pod that was killed or has left, with an empty runtime."""
        self.runtimes[number].start()
        self.pods[number].start()

    def start_etcd(self) -> None:
        self.etcd.start()

    def restore_etcd(self) -> None:
        """Bring back what etcd held before it was wiped."""
        self.etcd.restore()
        self.etcd.start()

    def wipe_etcd(self) -> None:
        self.etcd.wipe()
        self.etcd.start()


@contextlib.contextmanager
def fleet(
    directory: Path,
    *,
    num_pods: int,
    models_per_pod: int,
    load_s: float,
    with_envoy: bool = False,
    network: PodNetwork | None = None,
    switches: Mapping[str, Any] | None = None,
) -> Iterator[Fleet]:
    """Start the processes, and return when all pods are ready.

    `with_envoy`: callers reach the pods through Envoy. `network`: where the pods run. `switches`: more of tests.support.fake_runtime.Switches.
    """
    etcd = EtcdServer(directory, host=HUB if network else "127.0.0.1")
    with contextlib.ExitStack() as stack:
        stack.callback(etcd.kill)
        etcd.start()
        runtimes, pods = [], []
        for number in range(num_pods):
            folder = directory / f"runtime{number}"
            folder.mkdir()
            runtimes.append(
                RuntimeProcess(
                    folder,
                    {
                        "capacity_bytes": models_per_pod * MODEL_BYTES,
                        "default_size_bytes": MODEL_BYTES,
                        "load_s": load_s,
                        "loading_concurrency": 4,
                        **(switches or {}),
                    },
                )
            )
            stack.callback(runtimes[-1].kill)
            runtimes[-1].start()
            pods.append(
                stack.enter_context(
                    mesh_process(
                        directory,
                        f"pod{number}",
                        store=etcd.url,
                        runtime_grpc=f"unix:{folder}/runtime.sock",
                        runtime_http=f"unix:{folder}/http.sock",
                        host=network.host(number) if network else "127.0.0.1",
                        within=network.within(number) if network else (),
                        log_requests=False,
                        envoy="auto" if with_envoy else "",
                        envoy_dir=f"{directory}/envoy{number}",
                    )
                )
            )
        for pod in pods:
            pod.wait_ready()
        yield Fleet(etcd, pods, runtimes, network)


async def register(pod: MeshProcess, models: Sequence[str]) -> None:
    async with grpc.aio.insecure_channel(pod.grpc_address) as channel:
        stub = ModelMeshStub(channel)
        for model in models:
            info = pb.ModelInfo(type="llm", path=f"/{model}")
            await stub.registerModel(pb.RegisterModelRequest(modelId=model, modelInfo=info))
