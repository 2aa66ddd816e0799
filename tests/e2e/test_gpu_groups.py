"""One server with a group of two ranks and two single ones, on a CPU: models are spread, evicted, shared and lost by group."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import greedy
from tests.support import stack
from tests.support.checkpoints import tiny_llama
from tests.support.edge import PROMPT, Edge

SINGLES = ("one", "two", "three")


@dataclass(frozen=True, slots=True)
class Served:
    edge: Edge
    texts: dict[str, str]
    pid: int

    def model(self, name: str) -> dict[str, Any]:
        return dict(self.edge.ask("GET", f"/admin/v1/models/{name}").json())

    def devices(self, name: str) -> str:
        [copy] = self.model(name)["copies"]
        return str(copy["devices"])

    def evictions(self, name: str) -> float:
        text = self.edge.ask("GET", "/metrics").text
        found = re.search(rf'^repertory_model_evictions_total{{model_name="{name}"}} (\S+)', text, re.MULTILINE)
        return float(found[1]) if found is not None else 0.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each device holds the weights and the KV cache of one model."""
    base = tmp_path_factory.mktemp("groups")
    texts = {}
    for seed, name in enumerate((*SINGLES, "pair")):
        texts[name] = greedy(tiny_llama(base / name, seed), PROMPT, 8)
    flags = ("--device", "cpu", "--gpu-groups", "2,1,1", "--memory", "8MiB", "--oversubscribe", "disk")
    with stack.serve(*flags, log=base / "serve.log") as running:
        edge = Edge(running.url)
        for name in SINGLES:
            assert edge.register(name, base / name, load=True).status < 300
            assert edge.complete(name).status == 200
        assert edge.register("pair", base / "pair", tensor_parallel=2).status < 300
        yield Served(edge, texts, running.pid)


def test_models_of_all_groups_answer_as_greedy(served: Served) -> None:
    for _ in range(2):
        for name, text in served.texts.items():
            answer = served.edge.complete(name)
            assert (answer.status, answer.completion) == (200, text)


def test_single_models_are_spread_and_share_a_device_by_turns(served: Served) -> None:
    places = {name: served.devices(name) for name in SINGLES}
    assert set(places.values()) == {"cpu:2", "cpu:3"}
    lone = next(name for name in SINGLES if list(places.values()).count(places[name]) == 1)
    sharing = [name for name in SINGLES if name != lone]
    for _ in range(2):
        for name in sharing:
            assert served.edge.complete(name).completion == served.texts[name]
    assert served.model(lone)["tier"] == "device"
    deadline_s = time.monotonic() + 10
    while not all(served.evictions(name) for name in sharing) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert all(served.evictions(name) for name in sharing)
    assert served.evictions(lone) == 0


def test_a_divided_model_takes_the_group_of_two_and_its_bytes_add_up(served: Served) -> None:
    assert served.edge.complete("pair").status == 200
    assert served.devices("pair") == "cpu:0,cpu:1"
    deadline_s = time.monotonic() + 10
    while True:
        [pod] = served.edge.ask("GET", "/admin/v1/pods").json()["pods"]
        models = served.edge.ask("GET", "/admin/v1/models").json()["models"]
        if (in_all := sum(model["device_bytes"] for model in models)) == pod["device_used_bytes"]:
            break
        assert time.monotonic() < deadline_s, (in_all, pod)
        time.sleep(0.2)
    assert [device["name"] for device in pod["devices"]] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    assert [device["group"] for device in pod["devices"]] == ["cpu:0", "cpu:0", "cpu:2", "cpu:3"]
    assert sum(device["used_bytes"] for device in pod["devices"]) == pod["device_used_bytes"] > 0
    assert sum(device["budget_bytes"] for device in pod["devices"]) == pod["device_budget_bytes"] == 32 << 20


def test_a_size_that_no_group_has_is_refused_with_the_groups(served: Served) -> None:
    registered = served.edge.register("four", served.model("pair")["uri"], tensor_parallel=4)
    sentence = "its tensor_parallel is 4, and the groups of devices here have sizes 2, 1, 1"
    assert registered.status >= 400 or sentence in registered.json()["fit"]["reason"]
    answer = served.edge.complete("four")
    assert answer.status >= 400
    assert sentence in answer.error


def test_fit_says_how_many_devices_share_a_model(served: Served) -> None:
    uri = served.model("pair")["uri"]
    on_one, on_two = (
        served.edge.ask("POST", "/admin/v1/fit", {"uri": uri, "tensor_parallel": wanted}).json()
        for wanted in ("auto", 2)
    )
    assert (on_one["num_devices"], on_two["num_devices"]) == (1, 2)
    assert on_two["weight_bytes"] < on_one["weight_bytes"] < 2 * on_two["weight_bytes"]


def test_the_end_of_one_group_leaves_the_models_of_others(served: Served) -> None:
    assert served.edge.complete("pair").status == 200
    engines = [
        child
        for child in psutil.Process(served.pid).children(recursive=True)
        if "runtime.engine" in child.cmdline() and '"tensor_parallel":2' in " ".join(child.cmdline())
    ]
    assert len(engines) == 1
    engines[0].kill()
    for name in SINGLES:
        answer = served.edge.complete(name)
        assert (answer.status, answer.completion) == (200, served.texts[name])
    deadline_s = time.monotonic() + 60
    while (answer := served.edge.complete("pair")).status != 200 and time.monotonic() < deadline_s:
        assert answer.status == 503
        time.sleep(0.2)
    assert answer.completion == served.texts["pair"]
