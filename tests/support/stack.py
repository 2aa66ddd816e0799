"""Runs `repertory serve`, or the mesh alone, in its own folder on free ports, for tests and benchmarks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.units import parse_size
from mesh.client.admin import AdminClient


@dataclass(frozen=True, slots=True)
class Stack:
    """`url` is the mesh's HTTP base, `grpc` its gRPC address, `runtime_http` the runtime's own unix socket."""

    url: str
    grpc: str
    runtime_http: str
    runtime_grpc: str
    admin: AdminClient
    ready_s: float
    pid: int


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def bytes_of(text: str) -> int:
    """Return the bytes of a size in the form of `serve --memory`."""
    return parse_size(text)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serve(
    *flags: str,
    home: Path | None = None,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    model_roots: str = "/",
) -> Iterator[Stack]:
    """Run `repertory serve`, ready within 120 s. `log` receives the output; None discards it.

    Models may be registered from below `model_roots`; empty leaves that to `flags`.
    """
    with contextlib.ExitStack() as stack:
        base = home or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repertory-")))
        http, grpc = free_port(), free_port()
        command: Sequence[str] = [
            sys.executable,
            "-m",
            "mesh",
            "serve",
            "--home",
            str(base),
            "--http-listen",
            f"127.0.0.1:{http}",
            "--grpc-listen",
            f"127.0.0.1:{grpc}",
            *(("--model-roots", model_roots) if model_roots else ()),
            *flags,
        ]
        sink = stack.enter_context(log.open("wb")) if log is not None else subprocess.DEVNULL
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        stack.callback(_stop, process)
        url = f"http://127.0.0.1:{http}"
        wait_ready(process, f"{url}/readyz", log)
        run_dir = base / "run"
        yield Stack(
            url,
            f"127.0.0.1:{grpc}",
            f"{run_dir}/runtime-http.sock",
            f"unix:{run_dir}/runtime.sock",
            AdminClient(url),
            time.perf_counter() - started,
            process.pid,
        )


@dataclass(frozen=True, slots=True)
class Mesh:
    url: str
    grpc: str
    admin: AdminClient
    pid: int


@contextlib.contextmanager
def mesh(home: Path, runtime_grpc: str, runtime_http: str, log: Path | None = None, **more: object) -> Iterator[Mesh]:
    """Run only the mesh, in front of a runtime that is running or starting, with files below `home`. `more`: further settings."""
    http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    settings = {
        "http_listen": http,
        "grpc_listen": grpc,
        "store": f"embedded:{home}/registry",
        "runtime_grpc": runtime_grpc,
        "runtime_http": runtime_http,
        "grace_s": 1.0,
        **more,
    }
    (home / "mesh.json").write_text(json.dumps(settings))
    with program("mesh", "serve-mesh", "--config", f"{home}/mesh.json", log=log) as process:
        wait_ready(process, f"http://{http}/readyz", log)
        yield Mesh(f"http://{http}", grpc, AdminClient(f"http://{http}"), process.pid)


@contextlib.contextmanager
def program(
    *words: str, log: Path | None = None, environment: dict[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run `python -m …`. `log` is appended to; None discards the output."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("ab")) if log is not None else subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        stack.callback(_stop, process)
        yield process


def wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path | None) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"serve ended with status {process.returncode}\n{log.read_text()[-4000:] if log else ''}"
            )
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
            if response.status == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"serve was not ready within 120 s\n{log.read_text()[-4000:] if log else ''}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load_and_wait(stack: Stack | Mesh, name: str, uri: str, timeout_s: float = 900.0, **settings: object) -> float:
    """Register and load; returns the seconds from the call for the load to LOADED. Raises RuntimeError with the cause."""
    stack.admin.register({"name": name, "uri": uri, **settings})
    started = time.perf_counter()
    stack.admin.load(name)
    while time.perf_counter() - started < timeout_s:
        model = stack.admin.model(name)
        if model.state == "loaded":
            return time.perf_counter() - started
        if model.state in ("failed", "quarantined"):
            raise RuntimeError(f"{name}: {model.error}")
        time.sleep(0.02)
    raise RuntimeError(f"{name} was not loaded within {timeout_s:g} s")
