"""ModelMesh's recorded answers, replayed against our pods as processes over a real etcd.

Every step must be answered alike, or be listed in differences.json with the reason; a listed step that is answered alike fails, too.
"""

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.support.etcd import EtcdServer, free_port
from tests.support.modelmesh_replay import Pods, replay
from tests.support.waiting import until

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CONSTRAINTS = {
    "rt:gpu": {"required": ["gpu"]},
    "rt:nowhere": {"required": ["nowhere"]},
    "rt:pref": {"preferred": ["gpu"]},
}
STATIC_INFO = {"type": "llm", "path": "file:///static?size=1"}
STATIC_MODELS = [
    {"modelId": "static1", "modelInfo": STATIC_INFO, "ensureLoaded": True},
    {"modelId": "static2", "modelInfo": STATIC_INFO},
    {"modelId": "sv-1", "vModelId": "sv", "modelInfo": STATIC_INFO},
]


@dataclass(frozen=True)
class Setup:
    """How a recording was made. `first_pod` are further flags of pod0."""

    name: str
    num_pods: int
    concurrency: int = 4
    environment: dict[str, str] = field(default_factory=dict)
    first_pod: tuple[str, ...] = ()


SETUPS = (
    Setup("one_pod", 1, concurrency=2),
    Setup("three_pods", 3),
    Setup("writes", 3),
    Setup(
        "configured",
        2,
        environment={
            "MM_TYPE_CONSTRAINTS": json.dumps(CONSTRAINTS),
            "MM_AUTO_REGISTER_MODELS": json.dumps(STATIC_MODELS),
        },
        first_pod=("--labels", "gpu"),
    ),
    Setup("read_only", 1, environment={"KV_READ_ONLY": "true"}),
)


@contextmanager
def running(setup: Setup, etcd: EtcdServer, directory: Path) -> Iterator[Pods]:
    addresses, runtimes, metrics = [], [], ""
    with ExitStack() as processes:
        for number in range(setup.num_pods):
            folder = directory / f"runtime{number}"
            folder.mkdir()
            _start(processes, directory, "tests.support.modelmesh_runtime", str(folder), str(setup.concurrency))
            grpc_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
            flags = ["--store", etcd.url, "--service-name", "repertory", "--instance-id", f"pod{number}"]
            flags += ["--grpc-listen", grpc_address, "--http-listen", http_address]
            flags += ["--runtime-grpc", f"unix:{folder}/runtime.sock", "--runtime-http", ""]
            flags += setup.first_pod if number == 0 else ()
            _start(processes, directory, "mesh", "serve-mesh", *flags, environment=setup.environment)
            addresses.append(grpc_address)
            runtimes.append(folder)
            metrics = metrics or f"http://{http_address}/metrics"
            asyncio.run(until(partial(_is_ready, http_address), 60))
        yield Pods(tuple(addresses), tuple(runtimes), metrics, etcd.endpoint)


def _start(
    processes: ExitStack, directory: Path, module: str, *arguments: str, environment: dict[str, str] | None = None
) -> None:
    log = processes.enter_context((directory / "log").open("ab"))
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env={**os.environ, **(environment or {})}
    )
    processes.callback(process.wait)
    processes.callback(process.kill)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_recording_is_answered_alike(setup: Setup, own_etcd: EtcdServer, tmp_path: Path) -> None:
    scenarios = json.loads((HERE / "recorded" / f"{setup.name}.json").read_text())
    with running(setup, own_etcd, tmp_path) as pods:
        different = asyncio.run(replay(scenarios, pods))
    listed = json.loads((HERE / "differences.json").read_text()).get(setup.name, {})
    found = {text.partition(":")[0]: text for text in different}
    unlisted = [text for step, text in found.items() if step not in listed]
    assert not unlisted, "\n".join(unlisted)
    assert set(listed) <= set(found), "listed as different, and answered alike"
