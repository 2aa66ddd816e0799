"""More models than memory, and more callers than patience: nobody starves, nothing is loaded twice, names move without a gap, and in the end
nothing is left over."""

import contextlib
import http.client
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import stack
from tests.support.checkpoints import tiny_llama
from tests.support.edge import Answer, Edge

# two tiny models fit beside each other, three do not; of the wide ones only one at a time
_MEMORY = "20MiB"
_SOAK_CALLERS = 6

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Tight:
    edge: Edge
    models: Path
    pid: int

    def processes(self) -> list[psutil.Process]:
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def engine(self) -> psutil.Process:
        return next(process for process in self.processes() if "runtime.engine" in process.cmdline())

    def loads(self, name: str) -> int:
        start = f'repertory_mesh_loads_total{{model_name="{name}",outcome="loaded"}} '
        lines = self.edge.ask("GET", "/metrics").text.splitlines()
        return next((int(float(line.removeprefix(start))) for line in lines if line.startswith(start)), 0)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tight]:
    base = tmp_path_factory.mktemp("tight")
    models = base / "models"
    for seed, name in enumerate(("ada", "bob", "cyd")):
        tiny_llama(models / name, seed)
    for seed, name in enumerate(("max", "mia")):
        tiny_llama(models / name, 10 + seed, hidden=256, layers=4)
    config = base / "config.yaml"
    config.write_text("runtime: {grace_s: 5, engine: {debug_checks: true, num_threads: 1}}\n")
    with stack.serve(
        "--device", "cpu", "--memory", _MEMORY, "--wait-budget", "60", "--config", str(config), log=base / "serve.log"
    ) as running:
        yield Tight(Edge(running.url), models, running.pid)


def test_requests_for_a_cold_model_share_one_load(tight: Tight) -> None:
    tight.edge.register("cold", tight.models / "ada")
    with ThreadPoolExecutor(100) as callers:
        answers = list(callers.map(lambda _: tight.edge.complete("cold"), range(100)))
    assert Counter(answer.status for answer in answers) == {200: 100}
    assert len({answer.completion for answer in answers}) == 1
    assert tight.loads("cold") == 1


def test_models_that_only_fit_alone_take_turns(tight: Tight) -> None:
    for name in ("max", "mia"):
        tight.edge.register(name, tight.models / name)
    with _callers(lambda name: tight.edge.complete(name), ("max", "max", "max", "mia", "mia", "mia")) as answers:
        # the one, the other, and the one again, although no caller ever pauses
        _until(lambda: tight.loads("max") + tight.loads("mia") >= 3, "they do not take turns")
    counts = Counter((name, answer.status) for name, answer in answers)
    assert set(counts) == {("max", 200), ("mia", 200)}
    # who waited for the same model was answered in the same turn
    assert min(counts.values()) >= 3


def test_name_gets_other_files_without_a_gap(tight: Tight) -> None:
    edge = tight.edge
    known = {}
    for name in ("ada", "bob", "cyd"):
        edge.register(name, tight.models / name)
        known[name] = edge.complete(name).completion
    assert len(set(known.values())) == 3
    edge.register("star", tight.models / "ada", load=True)
    with _callers(lambda _: edge.complete("star"), ("a", "b", "c")) as answers:
        for name in ("bob", "cyd", "ada"):
            edge.register("star", tight.models / name)
            _until(lambda name=name: edge.complete("star").completion == known[name], f"star did not become {name}")  # type: ignore[misc]
            assert edge.complete("star").completion == known[name]
        # files that cannot be loaded change nothing
        (tight.models / "hollow").mkdir()
        edge.register("star", tight.models / "hollow")
        _until(lambda: "hollow" in _model(edge, "star")["error"], "the failure is not reported")
        assert _model(edge, "star")["state"] == "loaded"
        time.sleep(0.5)
    assert Counter(answer.status for _, answer in answers) == {200: len(answers)}
    assert {answer.completion for _, answer in answers} == set(known.values())
    assert edge.complete("star").completion == known["ada"]


def test_model_that_kills_the_engine_twice_is_quarantined_by_name(tight: Tight) -> None:
    edge = tight.edge
    edge.register("deadly", tight.models / "bob")
    edge.register("ada", tight.models / "ada")
    sound = edge.complete("ada").completion
    for _ in range(2):
        assert edge.complete("deadly").status == 200
        # A crash during other models' loads has several suspects, and counts half for each.
        _until(lambda: not _loading(edge), "models are still being loaded again")
        stream = edge.stream("deadly", max_tokens=450, ignore_eos=True)
        stream.read(100)
        tight.engine().send_signal(signal.SIGKILL)
        rest = stream.read().decode()
        assert json.loads(rest.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert "[DONE]" not in rest
        assert edge.complete("ada").completion == sound
    refused = edge.complete("deadly")
    assert refused.status == 424
    assert "model deadly" in refused.error
    assert "quarantined" in refused.error
    assert edge.ask("GET", "/admin/v1/models/deadly").json()["state"] == "quarantined"
    assert edge.complete("ada").completion == sound
    # asked for by name, it gets another chance
    assert edge.ask("POST", "/models/load", {"model": "deadly"}).status == 200
    _until(lambda: edge.complete("deadly").status == 200, "it was not forgiven")


def test_soak_leaves_nothing_behind(tight: Tight, pytestconfig: pytest.Config) -> None:
    """Each caller does every deed, in an order of its own. With `--long` twenty times."""
    edge = tight.edge
    names = ("ada", "bob", "cyd", "max")
    for name in names:
        edge.register(name, tight.models / name)
    _rest(edge)
    _unload_all(edge)
    before = _held(tight)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    repeats = 20 if pytestconfig.getoption("--long") else 1
    with ThreadPoolExecutor(_SOAK_CALLERS) as callers:
        lives = [
            callers.submit(_life, tight, random.Random(seed + number), names, repeats)
            for number in range(_SOAK_CALLERS)
        ]
        ends: Counter[str] = sum((life.result() for life in lives), Counter())
    print(dict(ends))
    assert ends["answered"] >= 10 * repeats
    assert all(kind in ends for kind in ("left", "streamed", "unloaded", "registered"))
    assert not [end for end in ends if end.startswith("odd")], ends
    for name in names:
        assert edge.complete(name).status == 200
    _rest(edge)
    _unload_all(edge)
    _until(lambda: _held(tight).device_bytes == before.device_bytes, f"{_held(tight)} is not {before}")
    after = _held(tight)
    assert after.pids == before.pids
    # connections of callers who have left are closed within moments; what grows with requests would be hundreds
    _until(lambda: _held(tight).num_fds <= before.num_fds + 12, f"descriptors: {_held(tight)} after {before}")


def _life(tight: Tight, chance: random.Random, names: tuple[str, ...], repeats: int) -> Counter[str]:
    deeds = chance.sample(_DEEDS, sum(_COUNTS) * repeats, counts=[count * repeats for count in _COUNTS])
    return Counter(deed(tight, chance, chance.choice(names)) for deed in deeds)


def _answer(tight: Tight, chance: random.Random, name: str) -> str:
    answer = tight.edge.complete(
        name, max_tokens=chance.randint(1, 60), temperature=chance.choice((0, 1)), n=chance.randint(1, 3)
    )
    return "answered" if answer.status == 200 else _named(answer)


def _stream(tight: Tight, chance: random.Random, name: str) -> str:
    with contextlib.closing(tight.edge.stream(name, max_tokens=chance.randint(1, 100))) as response:
        text = response.read().decode()
    if response.status != 200:
        return _named(Answer(response.status, {}, text))
    last = [line for line in text.splitlines() if line.startswith("data: ")][-1].removeprefix("data: ")
    return "streamed" if last == "[DONE]" else f"event {json.loads(last)['error']['code']}"


def _leave(tight: Tight, chance: random.Random, name: str) -> str:
    response = tight.edge.stream(name, max_tokens=450, ignore_eos=True)
    with contextlib.suppress(http.client.HTTPException):
        response.read(chance.choice((0, 1, 300, 3000)))
    response.close()
    return "left" if response.status == 200 else _named(Answer(response.status, {}, "{}"))


def _unload(tight: Tight, _: random.Random, name: str) -> str:
    answer = tight.edge.ask("POST", "/models/unload", {"model": name})
    return "unloaded" if answer.status == 200 else _named(answer)


def _load(tight: Tight, _: random.Random, name: str) -> str:
    answer = tight.edge.ask("POST", "/models/load", {"model": name})
    return "load" if answer.status == 200 else _named(answer)


def _come_and_go(tight: Tight, chance: random.Random, _: str) -> str:
    """A name of its own: registered, perhaps used, removed."""
    name = f"guest-{chance.randrange(10**9)}"
    tight.edge.register(name, tight.models / chance.choice(("ada", "bob")), max_model_len=chance.choice((64, 128)))
    answer = tight.edge.complete(name) if chance.random() < 0.5 else None
    gone = tight.edge.ask("DELETE", f"/admin/v1/models/{name}")
    assert gone.status == 204, gone.text
    return "registered" if answer is None or answer.status == 200 else _named(answer)


def _nonsense(tight: Tight, chance: random.Random, name: str) -> str:
    faults: tuple[dict[str, object], ...] = (
        {"temperature": -1},
        {"prompt": "x" * 9000},
        {"n": 0},
        {"model": "nobody"},
        {"suffix": "x"},
    )
    fields = chance.choice(faults)
    answer = tight.edge.complete(name, **fields) if "model" not in fields else tight.edge.complete("nobody")
    return "refused" if answer.status in (400, 404, 501) else _named(answer)


_DEEDS: tuple[Callable[[Tight, random.Random, str], str], ...] = (
    _answer,
    _stream,
    _leave,
    _unload,
    _load,
    _come_and_go,
    _nonsense,
)
_COUNTS = (5, 3, 2, 1, 1, 1, 1)


def _named(answer: Answer) -> str:
    """An error that says what it is; anything else is odd."""
    if answer.status in (424, 429, 503) and answer.text:
        return f"error {answer.status}"
    return f"odd {answer.status} {answer.text[:300]}"


@dataclass(frozen=True, slots=True)
class _Held:
    device_bytes: int
    num_fds: int
    pids: frozenset[int]


def _held(tight: Tight) -> _Held:
    [pod] = tight.edge.ask("GET", "/admin/v1/pods").json()["pods"]
    processes = tight.processes()
    return _Held(
        pod["device_used_bytes"],
        sum(process.num_fds() for process in processes),
        frozenset(process.pid for process in processes),
    )


def _model(edge: Edge, name: str) -> dict[str, Any]:
    return dict(edge.ask("GET", f"/admin/v1/models/{name}").json())


def _rest(edge: Edge) -> None:
    """Until no request runs or waits anywhere."""

    def resting() -> bool:
        models = edge.ask("GET", "/admin/v1/models").json()["models"]
        return not any(model["running"] or model["waiting"] for model in models)

    _until(resting, "rows are left over")


def _loading(edge: Edge) -> list[str]:
    models = edge.ask("GET", "/admin/v1/models").json()["models"]
    return [model["name"] for model in models if model["state"] == "loading"]


def _unload_all(edge: Edge) -> None:
    for model in edge.ask("GET", "/admin/v1/models").json()["models"]:
        assert edge.ask("POST", "/models/unload", {"model": model["name"]}).status == 200
    _until(
        lambda: (
            not any(
                pod["used_bytes"] or pod["num_models"] or pod["device_used_bytes"]
                for pod in edge.ask("GET", "/admin/v1/pods").json()["pods"]
            )
        ),
        "models stay",
    )


@contextlib.contextmanager
def _callers(call: Callable[[str], Answer], names: tuple[str, ...]) -> Iterator[list[tuple[str, Answer]]]:
    """One caller for each of `names`, each asking again and again while the block runs; the list has every answer afterwards."""
    answers: list[tuple[str, Answer]] = []
    stopping = threading.Event()

    def ask_on(name: str) -> None:
        while not stopping.is_set():
            answers.append((name, call(name)))

    with ThreadPoolExecutor(len(names)) as threads:
        asking = [threads.submit(ask_on, name) for name in names]
        try:
            yield answers
        finally:
            stopping.set()
    for each in asking:
        each.result()


def _until(done: Callable[[], bool], what: str, timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
