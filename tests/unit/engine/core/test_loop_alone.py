"""The loop with one model: the size of its steps, its first reports and the crash marker."""

from collections.abc import Callable

import pytest

from common.model_state import Tier
from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import EngineStats, Loaded, Shutdown
from tests.support.engine_stage import stage
from tests.support.fake_backend import FakeBackend


@pytest.mark.parametrize(("device", "most"), [("fake", 400), ("cpu", 130)])
def test_step_budget_chunks_lone_prompt_only_on_cpu(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "device", device)
    made = stage(
        "a", max_model_len=1000, config={"max_batch_tokens": 512, "max_rows": 16}, kv=KvGeometry(16, 8, 8, 1, 64, 64)
    )
    made.backend.max_batch_tokens = 512
    made.backend.token_us = 4000.0  # half a second is 125 tokens
    for _ in range(20):
        made.add("a", [10], 3)
        made.until_quiet()
    made.backend.largest_step = 0
    made.add("a", list(range(20, 40)) * 20, 3)
    made.until_quiet()
    assert most - 10 <= made.backend.largest_step <= most
    made.check_all()
    made.close()


def test_loads_emit_stats_before_loaded() -> None:
    made = stage("a")
    first = next(
        event
        for event in made.events
        if isinstance(event, EngineStats | Loaded) and (isinstance(event, Loaded) or event.models)
    )
    assert isinstance(first, EngineStats)
    assert first.models[0].tier is Tier.DEVICE
    made.close()


def test_loop_reports_idle_state_once() -> None:
    made = stage("a", turn_s=0.01)
    made.turn(101)  # past the first seconds' figures
    made.add("a", [10], 150)  # longer than a second, so that a running state is reported
    made.until_quiet()
    reported = len(made.of(EngineStats))
    made.turn(2)
    last = made.of(EngineStats)[-1]
    assert isinstance(last, EngineStats)
    assert last.models[0].running == 0
    made.turn(20)
    assert len(made.of(EngineStats)) <= reported + 1, "reported once, not in every idle turn"
    made.close()


def test_loop_marks_model_of_background_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front blames the model that is marked, with requests or without: an idle turn runs a model unasked, or its weights come in."""
    made = stage("ab")
    made.add("b", [10], 3)
    made.until_quiet()
    assert made.marks[-1] == "b"
    seen: list[str] = []

    def idle(mark: Callable[[str], None]) -> bool:
        seen.append(made.marks[-1])
        if len(seen) == 1:
            mark("a")  # and runs it
            return True
        if len(seen) == 3:
            made.backend.specs["b"].swap_polls = 50
            made.unload("a")
            made.unload("b")
            made.load("b")
        if "b" in seen[3:]:
            made.inbox.put(Shutdown(0.0))
        return False

    monkeypatch.setattr(made.backend, "idle", idle)
    made.loop.run()
    assert seen[:3] == ["b", "a", ""], "what ran in idle turns, then no model"
    assert seen[-1] == "b", "the weights that come in"


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_loop_marks_model_of_broken_step(where: str) -> None:
    made = stage("ab", latency_polls=50)
    made.add("a", [4], 100)
    made.add("b", [4], 100)
    made.turn(6)
    while made.marks[-1] != "b":  # and what is launched next is a's
        made.turn()

    def lost() -> None:
        raise RuntimeError("the device fell off the bus")

    made.backend.synchronize = lost  # type: ignore[method-assign]
    made.backend.faults["a"] = where
    with pytest.raises(RuntimeError, match="fell off"):
        made.turn(8)
    assert made.marks[-1] == "a"
    if where == "collect":
        assert made.marks[-2] == "b", "another model's step was on its way behind it"
