"""One server on a CPU whose two devices serve single models and, as a group, a divided one. Each device holds the weights and the KV of one model."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import greedy
from tests.support import stack
from tests.support.checkpoints import tiny_llama
from tests.support.edge import PROMPT, Edge

SINGLES = ("one", "two")
NAMES = (*SINGLES, "pair")


@dataclass(frozen=True, slots=True)
class Served:
    edge: Edge
    folders: dict[str, Path]
    texts: dict[str, str]
    pid: int

    def model(self, name: str) -> dict[str, Any]:
        return dict(self.edge.ask("GET", f"/admin/v1/models/{name}").json())

    def answer(self, name: str) -> None:
        answer = self.edge.complete(name)
        assert (answer.status, answer.completion) == (200, self.texts[name]), answer.text

    def tiers(self) -> dict[str, str]:
        models = self.edge.ask("GET", "/admin/v1/models").json()["models"]
        return {model["name"]: model["tier"] for model in models if model["name"] in NAMES}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("groups")
    folders = {name: tiny_llama(base / name, seed) for seed, name in enumerate(NAMES)}
    texts = {name: greedy(folder, PROMPT, 8) for name, folder in folders.items()}
    flags = ("--device", "cpu", "--gpu-groups", "1,1+2", "--memory", "8MiB", "--oversubscribe", "disk")
    with stack.serve(*flags, log=base / "serve.log") as running:
        edge = Edge(running.url)
        for name in SINGLES:
            assert edge.register(name, folders[name], load=True).status < 300
        assert edge.register("pair", folders["pair"], tensor_parallel=2).status < 300
        yield Served(edge, folders, texts, running.pid)


def eventually(holds: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s, holds
        time.sleep(0.1)


def test_models_of_one_and_of_two_devices_take_turns_on_the_same_ones(served: Served) -> None:
    for _ in range(3):
        for name in NAMES:
            served.answer(name)
    assert {name: served.model(name)["copies"][0]["devices"] for name in NAMES} == {
        "one": "cpu:0",
        "two": "cpu:1",
        "pair": "cpu:0,cpu:1",
    }


def test_a_divided_model_displaces_both_single_ones_and_one_of_them_displaces_it(served: Served) -> None:
    for name in NAMES:
        served.answer(name)
    eventually(lambda: served.tiers() == {"one": "disk", "two": "disk", "pair": "device"})
    served.answer("two")
    eventually(lambda: served.tiers() == {"one": "disk", "two": "device", "pair": "disk"})
    served.answer("one")
    eventually(lambda: served.tiers() == {"one": "device", "two": "device", "pair": "disk"})


def test_figures_of_shared_devices_add_up(served: Served) -> None:
    for name in ("one", "pair", "one"):
        served.answer(name)

    def add_up() -> bool:
        [pod] = served.edge.ask("GET", "/admin/v1/pods").json()["pods"]
        models = served.edge.ask("GET", "/admin/v1/models").json()["models"]
        assert [(device["name"], device["budget_bytes"]) for device in pod["devices"]] == [
            ("cpu:0", 8 << 20),
            ("cpu:1", 8 << 20),
        ]
        assert pod["device_budget_bytes"] == 16 << 20
        assert all(device.get("used_bytes", 0) <= device["budget_bytes"] for device in pod["devices"])
        used = sum(device.get("used_bytes", 0) for device in pod["devices"])
        return bool(used == pod["device_used_bytes"] == sum(model["device_bytes"] for model in models) > 0)

    eventually(add_up)
    text = served.edge.ask("GET", "/metrics").text
    budgets = re.findall(r'^repertory_device_budget_bytes\{device="([^"]+)"\} (\S+)', text, re.MULTILINE)
    assert {name: float(size) for name, size in budgets} == {"cpu:0": 8 << 20, "cpu:1": 8 << 20}


def test_fit_names_the_models_that_leave_both_devices(served: Served) -> None:
    served.answer("one")
    served.answer("two")
    eventually(lambda: served.tiers()["two"] == served.tiers()["one"] == "device")
    fit = served.edge.ask("POST", "/admin/v1/fit", {"uri": str(served.folders["pair"]), "tensor_parallel": 2}).json()
    assert (fit["fits"], fit["num_devices"]) == (True, 2)
    assert len(fit["evicts"]) == 2


def test_a_busy_model_is_not_evicted_and_the_divided_one_waits(served: Served) -> None:
    served.answer("one")
    served.answer("two")
    expected = served.edge.complete("one", max_tokens=200, ignore_eos=True).completion
    answers = []
    asks = threading.Thread(target=lambda: answers.append(served.edge.complete("pair")))
    with served.edge.stream("one", max_tokens=200, ignore_eos=True) as response:
        first = response.read(10)
        asks.start()
        chunks = (first + response.read()).decode()
    asks.join(60)
    assert "".join(re.findall(r'"text": ?"((?:[^"\\]|\\.)*)"', chunks)).encode() == _escaped(expected)
    assert [answer.completion for answer in answers] == [served.texts["pair"]]


def _escaped(text: str) -> bytes:
    """Return a text as it stands inside of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def ranks(served: Served) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(served.pid).children(recursive=True)
        if "runtime.engine.ranks" in child.cmdline() and child.is_running()
    ]


def test_a_lost_rank_gives_its_memory_back(served: Served) -> None:
    served.answer("pair")
    [rank] = ranks(served)
    rank.kill()
    for name in SINGLES:
        served.answer(name)
    deadline_s = time.monotonic() + 60
    while (answer := served.edge.complete("pair")).status != 200 and time.monotonic() < deadline_s:
        assert answer.status == 503
        time.sleep(0.2)
    assert answer.completion == served.texts["pair"]
    assert [again.pid for again in ranks(served)] != [rank.pid]
    for name in NAMES:
        served.answer(name)
