"""Loads and unloads beside running requests, on the fake backend: their order, their refusals and their ends."""

from runtime.ipc.messages import Loaded, LoadFailed, Unloaded
from runtime.types import FinishReason
from tests.support.engine_stage import Stage, error_of, stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec


def test_loads_refuse_oversized_model_with_sizes() -> None:
    made = Stage(FakeBackend({"big": FakeSpec(weight_slabs=32), "huge": FakeSpec(weight_slabs=99)}, total_slabs=32))
    made.load("big")
    made.load("huge")
    made.turn(10)
    assert [f.code for f in made.failures()] == ["FAILED_PRECONDITION"] * 2
    for failure in made.failures():
        assert str(32 * 4096) in failure.message
    made.close()


def test_register_limits_context_to_budget() -> None:
    spec = FakeSpec(weight_slabs=20, max_model_len=10_000, eos=())
    made = Stage(FakeBackend({"a": spec}, total_slabs=40, max_batch_tokens=512))
    made.load("a")
    made.turn(10)
    assert made.loop.table.models["a"].facts.max_model_len == 20 * 16
    spec.max_model_len = 320
    made.add("a", [4] * 300, 1000)
    made.until_quiet()
    made.check_all()
    assert made.answers[1].finish is FinishReason.CONTEXT
    made.close()


def test_loads_answer_every_command_in_order() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4), "bad": FakeSpec(fails="no config.json")}))
    made.load("a")
    made.load("a")
    made.turn(10)
    made.load("a")
    made.turn(2)
    assert made.loaded() == ["a", "a", "a"]
    made.load("bad")
    made.turn(5)
    assert [(f.code, "no config.json" in f.message) for f in made.failures()] == [("FAILED_PRECONDITION", True)]
    made.load("a", max_model_len=50)  # another context: loaded again
    made.turn(10)
    assert made.loop.table.models["a"].facts.max_model_len == 50
    made.unload("a")
    made.unload("a")
    made.turn(2)
    assert made.unloaded() == ["a", "a"]
    made.close()


def test_loads_unload_cancels_load_in_progress() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4)}))
    made.load("a")
    made.turn()
    made.unload("a")
    made.turn()
    assert [f.code for f in made.failures()] == ["CANCELLED"]
    assert made.unloaded() == []  # not before it is really gone
    made.load("a")
    made.turn(20)
    assert made.unloaded() == ["a"]
    assert made.loaded() == ["a"]
    assert sum(not memory.closed for memory in made.backend.memories) == 1
    made.close()


def test_loads_superseded_while_loading_are_answered_in_order() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4)}))
    made.load("a")
    made.turn()
    for max_model_len in (50, 60):
        made.load("a", max_model_len=max_model_len)
    made.unload("a")
    made.load("a", max_model_len=70)
    made.load("a", max_model_len=70)
    made.until_quiet()
    answers = [event for event in made.events if isinstance(event, Loaded | LoadFailed | Unloaded)]
    assert [type(answer) for answer in answers] == [LoadFailed, LoadFailed, LoadFailed, Unloaded, Loaded, Loaded]
    assert {failure.code for failure in made.failures()} == {"CANCELLED"}
    assert made.loop.table.models["a"].facts.max_model_len == 70
    assert sum(not memory.closed for memory in made.backend.memories) == 1
    made.close()


def test_loads_unload_aborts_rows_and_frees_memory() -> None:
    made = stage("a")
    answers = [made.add("a", [4], 100) for _ in range(20)]
    made.turn(6)
    made.unload("a")
    made.turn(2)
    assert {a.finish for a in answers} == {FinishReason.ABORTED}
    assert made.loop.table.slabs.free == 32
    late = made.add("a", [4], 4)
    made.turn(2)
    assert error_of(late)[0] == "NOT_FOUND"
    made.close()
