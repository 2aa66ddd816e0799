"""What each verb shows in terminals of 80 and 120 columns. UPDATE_SNAPSHOTS=1 writes the files again after an intended change."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.model_fit import ModelFit
from common.units import GIB, MIB
from mesh.cli.main import VERBS as ALL_VERBS
from mesh.cli.main import main
from tests.support.admin_server import AdminServer, sample_cache, sample_caches, sample_models, sample_pods
from tests.support.terminal import Screen, call_in_terminal, run_in_terminal

SNAPSHOTS = Path(__file__).parent / "snapshots"
LONG = "meta-llama/Llama-3.1-8B-Instruct-for-customer-support"
_RANDOM = re.compile(r"(?<=shown only now: )\S+|\b[0-9a-f]{64}\b")
VERBS = {
    "ps": ["ps"],
    "ps-all": ["ps", "--all"],
    "ps-filtered": ["ps", "smol*", "--state", "packing", "--pod", "gpu-b"],
    "ps-nothing": ["ps", "nobody"],
    "list": ["list"],
    "pods": ["pods"],
    "show": ["show", LONG],
    "show-failed": ["show", "broken"],
    "fit": ["fit", LONG],
    "fit-gguf": ["fit", "hf://org/model-GGUF"],
    "register-gguf": ["register", "new", "hf://org/model-GGUF"],
    "register": ["register", "new", "/models/new", "--load"],
    "run": ["run", "prod", "What is the capital of France?"],
    "run-unknown": ["run", "smoll"],
    "load": ["load", "idle"],
    "stop": ["stop", "prod"],
    "alias": ["alias", "stable", "prod"],
    "alias-delete": ["alias", "stable", "--delete"],
    "rm": ["rm", "idle"],
    "rm-files": ["rm", "idle", "--files"],
    "cache": ["cache"],
    "cache-prune": ["cache", "--prune"],
    "ls": ["ls"],
    "unload-now": ["unload", "prod", "--now"],
    "new-key": ["new-key", "team-a", "--scope", "inference", "--model", "org/*", "--requests-per-minute", "60"],
}


# Tables, whose columns depend on the width of the terminal. Other verbs write the same sentences at any width.
TABLES = ("ps", "ps-all", "list", "pods", "show", "show-failed", "fit", "cache")
# Run as a user's shell does. The other verbs are called in the test's process, which serve-runtime would replace by another program.
PROCESSES = ("ps", "run", "load", "serve-runtime")
SHOWN = [
    pytest.param(name, columns, marks=() if columns == 80 or name in TABLES else pytest.mark.long)
    for columns in (80, 120)
    for name in VERBS
]


@pytest.fixture
def server() -> Iterator[AdminServer]:
    made = AdminServer(sample_models(), sample_pods())
    made.cache = sample_cache()
    made.fit = ModelFit(
        True,
        weight_bytes=5 * GIB,
        kv_bytes_per_token=128 * 1024,
        min_kv_bytes=16 * GIB,
        workspace_bytes=300 * MIB,
        capacity_bytes=120 * GIB,
        evicts=(
            "smol",
            "idle",
        ),
        max_model_len=131072,
        quantization="nf4",
        architecture="LlamaForCausalLM",
        num_parameters=8_030_000_000,
        exact=True,
    )
    yield made
    made.close()


def shown(server: AdminServer, columns: int, *arguments: str) -> Screen:
    environment = {"REPERTORY_SERVER": server.url}
    if arguments[0] in PROCESSES:
        return run_in_terminal([sys.executable, "-m", "mesh", *arguments], columns=columns, environment=environment)
    return call_in_terminal(lambda: main(arguments), columns=columns, environment=environment)


@pytest.mark.parametrize(("name", "columns"), SHOWN)
def test_verb_shows_its_snapshot(name: str, columns: int, server: AdminServer) -> None:
    check_snapshot(name, columns, shown(server, columns, *VERBS[name]), server)


def check_snapshot(name: str, columns: int, screen: Screen, server: AdminServer) -> None:
    assert "Traceback" not in screen.raw
    file = SNAPSHOTS / str(columns) / f"{name}.txt"
    text = f"{screen.text}[exit status {screen.status}]\n".replace(server.url, "http://SERVER")
    text = _RANDOM.sub("RANDOM", text)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_snapshots_cover_every_verb() -> None:
    assert {words[0] for words in VERBS.values()} | {"serve", "serve-mesh", "serve-runtime"} == ALL_VERBS


@pytest.mark.parametrize("columns", [80, 120])
def test_register_file_shows_its_snapshot(columns: int, server: AdminServer, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n  first: /models/first\n  second: {uri: 'hf://org/second', load: true}\naliases: {prod: first}\n"
    )
    check_snapshot("register-file", columns, shown(server, columns, "register", "-f", str(file)), server)


@pytest.mark.parametrize("columns", [80, 120])
def test_cache_of_several_pods_shows_its_snapshot(columns: int, server: AdminServer) -> None:
    server.cache = sample_caches()
    check_snapshot("cache-pods", columns, shown(server, columns, "cache"), server)


@pytest.mark.parametrize("name", TABLES)
def test_table_stays_within_the_terminal(name: str) -> None:
    """Lines longer than 80 columns would be wrapped by the terminal in the middle of a word."""
    assert max(map(len, (SNAPSHOTS / "80" / f"{name}.txt").read_text().splitlines())) <= 80


@pytest.mark.parametrize(
    "verb", ["", *sorted({words[0] for words in VERBS.values()}), "serve", "serve-mesh", "serve-runtime"]
)
def test_help_stays_within_the_terminal(verb: str, server: AdminServer) -> None:
    screen = shown(server, 80, *([verb] if verb else []), "--help")
    assert screen.status == 0
    assert [line for line in screen.text.splitlines() if len(line) > 80] == []
