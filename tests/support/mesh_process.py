"""Runs pods of a mesh as processes, which tests and benchmarks can stop, freeze and kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.etcd import free_port


@dataclass(eq=False)
class MeshProcess:
    """One pod's mesh. `directory` receives its configuration and its log. `clock_shift_s`: how far its wall clock is ahead.

    `within`: the beginning of its command line, such as one that enters a network namespace.
    """

    directory: Path
    instance_id: str
    grpc_address: str
    http_address: str
    settings: dict[str, Any]
    clock_shift_s: float = 0.0
    within: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://{self.http_address}"

    def start(self) -> None:
        config = {
            "grpc_listen": self.grpc_address,
            "http_listen": self.http_address,
            "instance_id": self.instance_id,
            "grace_s": 1.0,
            **self.settings,
        }
        file = self.directory / f"{self.instance_id}.json"
        file.write_text(json.dumps(config))
        with (self.directory / f"{self.instance_id}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", *self._program(), "serve-mesh", "--config", str(file)],
                stdout=log,
                stderr=log,
                env={**os.environ},
            )

    def _program(self) -> tuple[str, ...]:
        return ("tests.support.shifted_clock", str(self.clock_shift_s)) if self.clock_shift_s else ("mesh",)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"{self.instance_id} is not ready: {self.log()[-3000:]}")
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def log(self) -> str:
        return (self.directory / f"{self.instance_id}.log").read_text()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, from the return of this call on. With Envoy these are several processes."""
        freeze(self._running)
        for child in self._children():
            freeze(child)

    def thaw(self) -> None:
        for child in self._children():
            child.resume()
        self._running.send_signal(signal.SIGCONT)

    def kill_child(self, word: str) -> None:
        """Kill the process of a pod with Envoy whose command line has a word."""
        next(child for child in self._children() if word in " ".join(child.cmdline())).kill()

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self._running.pid).children(recursive=True)

    def leave(self, timeout_s: float = 30.0) -> None:
        """End the pod as Kubernetes does, by SIGTERM, and wait for its end."""
        self._running.terminate()
        self._running.wait(timeout_s)
        self.process = None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None
        return self.process


def freeze(process: "subprocess.Popen[bytes] | psutil.Process") -> None:
    process.send_signal(signal.SIGSTOP)
    seen = psutil.Process(process.pid)
    while seen.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)


@contextlib.contextmanager
def mesh_process(
    directory: Path,
    instance_id: str,
    *,
    store: str,
    runtime_grpc: str,
    runtime_http: str = "",
    clock_shift_s: float = 0.0,
    host: str = "127.0.0.1",
    within: tuple[str, ...] = (),
    **settings: Any,
) -> Iterator[MeshProcess]:
    """Start a pod and end it with the context. The caller waits until it is ready. `host`, `within`: where it listens, and how it gets there."""
    pod = MeshProcess(
        directory,
        instance_id,
        f"{host}:{free_port()}",
        f"{host}:{free_port()}",
        {"store": store, "runtime_grpc": runtime_grpc, "runtime_http": runtime_http, **settings},
        clock_shift_s,
        within,
    )
    pod.start()
    try:
        yield pod
    finally:
        pod.kill()
