"""Compares a gRPC call through the mesh's Envoy with one through an Envoy that only forwards: rate, latency and the CPU time of what is between.

    python -m bench.edge_envoy [--seconds 1.0] [--turns 5] [--clients 1,32,128] [--streams 1,32]

Client, server and rows are those of bench.edge; a ratio is to the Envoy that only forwards. The CPU time of the mesh's row is that of Envoy and the mesh.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from bench import h2_load
from bench.edge import EVENTS, MESSAGE, MODEL, SERVICE, Goal, Way, compare, stream, unary
from bench.h2_load import frame
from mesh.client.admin import AdminClient
from mesh.envoy.binary import INSTALLED, find_envoy
from tests.support import stack

BARE = "Envoy that only forwards"
OURS = "mesh with Envoy"
UNARY = Goal(calls=0.95, p99=1.1, cpu=1.15)
STREAM = Goal(calls=0.95, p99=float("inf"), cpu=1.15)

Json = dict[str, Any]


def _bare_configuration(port: int, server: str) -> Json:
    """Return the configuration of an Envoy with one route."""
    host, _, server_port = server.rpartition(":")
    kind = "type.googleapis.com/envoy.extensions"
    endpoint = {"address": {"socket_address": {"address": host, "port_value": int(server_port)}}}
    protocol = {
        "@type": f"{kind}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "server", "timeout": "0s"}}
    manager = {
        "@type": f"{kind}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bare",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{kind}.filters.http.router.v3.Router"}}],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
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
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@contextlib.contextmanager
def bare_envoy(home: Path, server: str) -> Iterator[Way]:
    port = stack.free_port()
    (home / "bare.json").write_text(json.dumps(_bare_configuration(port, server)))
    command = [str(find_envoy(INSTALLED).path), "-c", f"{home}/bare.json", "--disable-hot-restart", "-l", "error"]
    # A session of its own, as the supervised Envoy has: the kernel's scheduler shares cores among sessions first.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield Way(BARE, f"127.0.0.1:{port}", (process.pid,))
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def mesh_with_envoy(home: Path, server: str) -> Iterator[Way]:
    grpc, http = (f"127.0.0.1:{stack.free_port()}" for _ in range(2))
    settings = {
        "grpc_listen": grpc,
        "http_listen": http,
        "store": f"embedded:{home}/registry",
        "runtime_grpc": f"unix:{home}/runtime.sock",
        "runtime_http": f"unix:{home}/http.sock",
        "runtime_inference_grpc": server,
        "envoy_dir": f"{home}/envoy",
        "grace_s": 1.0,
    }
    (home / "mesh.json").write_text(json.dumps(settings))
    with stack.program("mesh", "serve-mesh", "--config", f"{home}/mesh.json", "--envoy") as process:
        stack.wait_ready(process, f"http://{http}/readyz", None)
        mesh = stack.Mesh(f"http://{http}", grpc, AdminClient(f"http://{http}"), process.pid)
        stack.load_and_wait(mesh, MODEL, "file:///nothing")
        yield Way(OURS, grpc, tuple(child.pid for child in psutil.Process(process.pid).children()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", default="1,32,128", help="numbers of clients of unary calls; empty = none")
    parser.add_argument("--streams", default="1,32", help="numbers of concurrent streams; empty = none")
    args = parser.parse_args()
    h2_load.check_installed()
    print("| call | clients | path | messages/s | p50 ms | p99 ms | CPU µs | of bare: rate | p99 | CPU | asked met |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --- |")
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        answers = {f"{SERVICE}/Generate": frame(MESSAGE), f"{SERVICE}/GenerateStream": frame(MESSAGE) * EVENTS}
        server = parts.enter_context(h2_load.serve(answers))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        paths = [
            Way("direct", server),
            parts.enter_context(bare_envoy(home, server)),
            parts.enter_context(mesh_with_envoy(home, server)),
        ]
        for path in paths:
            h2_load.wait_until_answering(unary(), path.address)
        unary().for_seconds(paths[-1].address, 1, 3.0)  # until Envoy has the model's cluster
        for load, counts, per_call, goal in (
            (unary(), args.clients, 1, UNARY),
            (stream(), args.streams, EVENTS, STREAM),
        ):
            for count in filter(None, counts.split(",")):
                compare(
                    paths,
                    load,
                    int(count),
                    args.seconds,
                    args.turns,
                    per_call=per_call,
                    goal=goal,
                    base=BARE,
                    ours=OURS,
                )


if __name__ == "__main__":
    main()
