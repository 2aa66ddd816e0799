"""Runs the ways to a server that lead through Envoy: one that only forwards, and the mesh's."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.edge import MODEL, Way
from mesh.client.admin import AdminClient
from mesh.envoy.binary import INSTALLED, find_envoy
from tests.support import stack

BARE = "Envoy that only forwards"
OURS = "mesh with Envoy"

Json = dict[str, Any]
_KIND = "type.googleapis.com/envoy.extensions"


@dataclass(frozen=True, slots=True)
class MeshWithEnvoy:
    grpc: str
    http: str
    mesh_pid: int
    envoy_pid: int


def http_manager(codec: str, route: Json) -> Json:
    """Return a connection manager with one route."""
    router = {"name": "router", "typed_config": {"@type": f"{_KIND}.filters.http.router.v3.Router"}}
    return {
        "@type": f"{_KIND}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bare",
        "codec_type": codec,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }


@contextlib.contextmanager
def envoy(file: Path, port: int, manager: Json, clusters: Sequence[Json]) -> "Iterator[subprocess.Popen[bytes]]":
    """Run an Envoy with one listener."""
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
    }
    file.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": list(clusters)}}))
    with envoy_of(file) as process:
        yield process


@contextlib.contextmanager
def envoy_of(file: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Run an Envoy with the configuration in a file."""
    command = [str(find_envoy(INSTALLED).path), "-c", str(file), "--disable-hot-restart", "-l", "error"]
    # A session of its own, as the supervised Envoy has: the kernel's scheduler shares cores among sessions first.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def bare_envoy(home: Path, server: str) -> Iterator[Way]:
    """Run an Envoy that forwards gRPC to a server."""
    port = stack.free_port()
    host, _, server_port = server.rpartition(":")
    endpoint = {"address": {"socket_address": {"address": host, "port_value": int(server_port)}}}
    protocol = {
        "@type": f"{_KIND}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "server",
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol,
        },
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "server", "timeout": "0s"}}
    with envoy(home / "bare.json", port, http_manager("HTTP2", route), [cluster]) as process:
        yield Way(BARE, f"127.0.0.1:{port}", (process.pid,))


@contextlib.contextmanager
def mesh_with_envoy(home: Path, **settings: object) -> Iterator[MeshWithEnvoy]:
    """Run a mesh with Envoy over the runtime of `home`, with the model loaded."""
    grpc, http = (f"127.0.0.1:{stack.free_port()}" for _ in range(2))
    content = {
        "grpc_listen": grpc,
        "http_listen": http,
        "store": f"embedded:{home}/registry",
        "runtime_grpc": f"unix:{home}/runtime.sock",
        "runtime_http": f"unix:{home}/http.sock",
        "envoy_dir": f"{home}/envoy",
        "grace_s": 1.0,
        **settings,
    }
    (home / "mesh.json").write_text(json.dumps(content))
    with stack.program("mesh", "serve-mesh", "--config", f"{home}/mesh.json", "--envoy") as process:
        stack.wait_ready(process, f"http://{http}/readyz", None)
        mesh = stack.Mesh(f"http://{http}", grpc, AdminClient(f"http://{http}"), process.pid)
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        mesh_pid, envoy_pid = (_child(process.pid, word) for word in ("mesh.pod", "envoy.json"))
        yield MeshWithEnvoy(grpc, http, mesh_pid, envoy_pid)


def _child(pid: int, word: str) -> int:
    return next(child.pid for child in psutil.Process(pid).children() if word in " ".join(child.cmdline()))


@contextlib.contextmanager
def way_through_mesh(home: Path, server: str) -> Iterator[Way]:
    """Run a mesh with Envoy whose calls end at a server."""
    with mesh_with_envoy(home, runtime_inference_grpc=server) as mesh:
        yield Way(OURS, mesh.grpc, (mesh.mesh_pid, mesh.envoy_pid))
