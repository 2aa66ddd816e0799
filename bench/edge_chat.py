"""Compares an HTTP chat whose body names the model with one whose header does, both through the mesh's Envoy, whose CPU time alone is counted."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import h2_load
from bench.edge import MODEL, Goal, Way, compare
from bench.envoy_paths import envoy, envoy_of, http_manager, mesh_with_envoy
from bench.h2_load import Load
from mesh.envoy.plan import Carrier
from mesh.envoy.routes import BODY_FILTERS, MODEL_HEADERS
from tests.support import stack

BY_HEADER = "model in a header"
BY_BODY = "model in the body"
CHAT = Goal(calls=0.0, p99=float("inf"), cpu=1.25)
BODY_BYTES = 1024
ANSWER = json.dumps({"choices": [{"message": {"role": "assistant", "content": "x" * 200}}]})


def run(clients: Sequence[int], seconds: float, turns: int, settle_s: float) -> None:
    """Print a row for each path and number of clients."""
    load = _load()
    with contextlib.ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        server = parts.enter_context(_server(home))
        parts.enter_context(stack.program("bench.idle_runtime", str(home)))
        mesh = parts.enter_context(mesh_with_envoy(home, runtime_http=server))
        paths = [parts.enter_context(_by_header(home)), Way(BY_BODY, mesh.http, (mesh.envoy_pid,))]
        for path in paths:
            h2_load.wait_until_answering(load, path.address)
            load.for_seconds(path.address, 1, settle_s)
        for count in clients:
            compare(
                paths, load, count, seconds, turns, per_call=1, goal=CHAT, base=BY_HEADER, ours=BY_BODY, kind="chat"
            )


def _load() -> Load:
    request: dict[str, Any] = {"model": MODEL, "temperature": 0.5, "messages": [{"role": "user", "content": ""}]}
    request["messages"][0]["content"] = "x" * (BODY_BYTES - len(json.dumps(request)))
    headers = {"content-type": "application/json", MODEL_HEADERS[Carrier.HTTP]: MODEL}
    return Load("/v1/chat/completions", headers, json.dumps(request).encode(), len(ANSWER), http1=True)


@contextlib.contextmanager
def _server(home: Path) -> Iterator[str]:
    """Run an Envoy that answers every call with the same text."""
    port = stack.free_port()
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": ANSWER}}}
    manager = http_manager("HTTP1", answer)
    with envoy(home / "server.json", port, manager, []):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _by_header(home: Path) -> Iterator[Way]:
    """Run the mesh's second Envoy: the same listener of HTTP, without the filters that read bodies, for callers that name the model in a header."""
    config = json.loads((home / "envoy/envoy.json").read_text())
    port = stack.free_port()
    resources = config["static_resources"]
    [listener] = [each for each in resources["listeners"] if each["name"] == Carrier.HTTP]
    listener["address"]["socket_address"]["port_value"] = port
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [each for each in manager["http_filters"] if each["name"] not in BODY_FILTERS]
    stripping = manager["early_header_mutation_extensions"][0]["typed_config"]
    stripping["mutations"] = [each for each in stripping["mutations"] if each["remove"] != MODEL_HEADERS[Carrier.HTTP]]
    resources["listeners"] = [listener]
    config["admin"]["address"]["pipe"]["path"] = f"{home}/by-header.sock"
    (home / "by-header.json").write_text(json.dumps(config))
    with envoy_of(home / "by-header.json") as process:
        yield Way(BY_HEADER, f"127.0.0.1:{port}", (process.pid,))
