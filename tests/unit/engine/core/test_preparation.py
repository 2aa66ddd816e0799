"""A load is answered when its model serves a first request at once, and captures keep out of the way of the requests after it."""

from collections.abc import Callable

import pytest

from common.model_state import Tier
from runtime.engine.interfaces import Bucket, GraphCapture, KvGeometry
from runtime.ipc.messages import Loaded, Unloaded
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec

CAPTURES = [GraphCapture("a", Bucket(1, 1, 1, 1024), record) for record in (False, True)]
SPEC = FakeSpec(eos=(), kv=KvGeometry(4, 32, 32, 1, 32, 64), swap_polls=10)


def stage(backend: FakeBackend | None = None, turn_s: float = 0.005) -> Stage:
    return Stage(backend or FakeBackend({"a": SPEC, "b": SPEC}), turn_s=turn_s)


def swapping(made: Stage) -> bool:
    return made.loop.table.models["a"].swapping


def test_load_is_answered_after_weights_and_graphs() -> None:
    made = stage()
    made.backend.captures += CAPTURES
    made.load("a")
    made.turn(8)
    assert swapping(made)
    assert made.loaded() == []
    made.turn(20)
    assert not swapping(made)
    assert made.loaded() == []
    for _ in CAPTURES:
        assert made.loop.idle()
    made.turn()
    assert made.loaded() == ["a"]
    assert made.stats().models[0].tier is Tier.DEVICE
    made.close()


def test_load_is_answered_after_two_seconds_without_graphs() -> None:
    made = stage(turn_s=0.1)
    made.backend.captures += CAPTURES
    made.load("a")
    made.turn(15)
    assert made.loaded() == []
    made.turn(15)
    assert made.loaded() == ["a"]
    made.close()


def test_load_beside_a_busy_model_waits_for_no_graphs() -> None:
    made = stage()
    made.load("b")
    made.until_quiet()
    answer = made.add("b", [1], 100)
    made.turn()
    made.backend.captures += CAPTURES
    made.load("a")
    made.turn(30)
    assert made.loaded() == ["b", "a"]
    assert answer.last is None
    made.until_quiet()
    made.close()


@pytest.mark.parametrize("command", ["load", "unload"])
def test_command_ends_the_preparation_of_its_model(command: str) -> None:
    made = stage()
    made.backend.captures += CAPTURES
    made.load("a")
    made.turn(20)
    assert made.loaded() == []
    {"load": made.load, "unload": made.unload}[command]("a")
    made.turn(2)
    answers = [type(event) for event in made.events if isinstance(event, Loaded | Unloaded)]
    assert answers == [Loaded, Loaded if command == "load" else Unloaded]
    assert made.loop.num_loading == 0
    made.close()


class IdleBackend(FakeBackend):
    """Calls `on_idle` in each idle turn without a capture."""

    on_idle: Callable[[], None]

    def idle(self, mark: Callable[[str], None]) -> bool:
        self.on_idle()
        return False


@pytest.mark.parametrize(("seconds", "captured"), [(0.0, []), (0.01, CAPTURES)])
def test_captures_begin_a_while_after_the_last_work(seconds: float, captured: list[GraphCapture]) -> None:
    backend = IdleBackend({"a": SPEC})
    made = stage(backend)
    made.load("a")
    made.until_quiet()
    made.add("a", [1], 4)
    made.until_quiet()
    backend.captures += CAPTURES
    turns: list[float] = []
    made.add("a", [2], 4)

    def on_idle() -> None:
        turns.append(made.now)
        made.now += seconds
        if len(turns) == 6:
            made.inbox.put(None)

    backend.on_idle = on_idle
    made.loop.run()
    assert backend.captured == captured
