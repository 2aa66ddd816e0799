"""A runtime that reports its state and answers no requests: when it counts as mute, for how long, and what its requests see."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.changes import Changes
from common.model_state import CopyState, ModelState, Tier
from mesh.routing.attempts import Attempt
from mesh.routing.carried_answers import PATIENCE_S, CarriedAnswers, CarriedCount
from mesh.routing.in_flight import InFlight
from mesh.routing.runtime_silence import RuntimeSilence, Silence, has_lost
from mesh.types import RuntimeSnapshot, Target
from tests.support.waiting import until

times = st.floats(0, 100)


@given(st.lists(times, max_size=6), times, st.floats(0.5, 5), times)
def test_silence_needs_three_overdue_requests_and_no_answer(
    started_s: list[float], answered_s: float, patience_s: float, now_s: float
) -> None:
    is_suspect = Silence().is_suspect(started_s, answered_s, patience_s, now_s)
    overdue = [at_s for at_s in started_s if now_s - at_s >= patience_s]
    assert is_suspect == (len(overdue) >= 3 and now_s - answered_s >= patience_s)


@given(st.integers(1, 8))
def test_silence_pauses_grow_until_an_answer(strikes: int) -> None:
    silence, now_s, pauses = Silence(), 10.0, []
    for _ in range(strikes):
        silence = silence.struck(0.0, now_s)
        assert silence.is_mute(now_s)
        pauses.append(silence.mute_until_s - now_s)
        now_s = silence.mute_until_s
        assert not silence.is_mute(now_s)
        # One request suffices to find out whether the runtime answers again.
        assert silence.is_suspect([now_s], 0.0, 1.0, now_s + 1.0)
    assert pauses == sorted(pauses)
    assert pauses[0] == 5.0
    assert pauses[-1] <= 80.0
    assert not silence.is_suspect([now_s], now_s, 1.0, now_s + 1.0)
    assert silence.struck(now_s, now_s + 9.0).strikes == 1


def model_state(model_id: str, *, running: int = 0, waiting: int = 0) -> ModelState:
    return ModelState(model_id=model_id, state=CopyState.LOADED, tier=Tier.DEVICE, running=running, waiting=waiting)


def test_has_lost_only_requests_that_the_runtime_does_not_report() -> None:
    snapshot = RuntimeSnapshot(0, models=(model_state("m", running=1), model_state("n"), model_state("o", waiting=2)))
    assert has_lost(snapshot, ["n"])
    assert has_lost(snapshot, ["n", "unknown"])
    assert not has_lost(snapshot, ["n", "m"])
    assert not has_lost(snapshot, ["o"])


class Runtime:
    """Reports the given state, and whether it has a service for that, which is asked in each turn."""

    def __init__(self) -> None:
        self.snapshot: RuntimeSnapshot | None = RuntimeSnapshot(0, ready=True, models=(model_state("m"),))
        self.foreign = False
        self.looks = 0
        self.turns = 0

    def is_foreign(self) -> bool:
        self.turns += 1
        return self.foreign

    async def look(self) -> RuntimeSnapshot | None:
        self.looks += 1
        return self.snapshot


def attempt_at(instance_id: str, *, age_s: float) -> Attempt:
    attempt = Attempt("m", Target(instance_id, True, "grpc", "http"))
    attempt.started_s = time.monotonic() - age_s
    return attempt


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(RuntimeSnapshot(0, ready=True, models=(model_state("m"),)), id="reports no request"),
        pytest.param(None, id="reports nothing"),
    ],
)
async def test_runtime_silence_ends_only_the_requests_at_its_own_runtime(snapshot: RuntimeSnapshot | None) -> None:
    runtime, in_flight = Runtime(), InFlight()
    silence = RuntimeSilence("own", in_flight, Changes(), look=runtime.look, is_foreign=runtime.is_foreign)
    waiting = [attempt_at("own", age_s=2.0) for _ in range(3)]
    elsewhere = attempt_at("peer", age_s=2.0)
    runtime.snapshot = RuntimeSnapshot(0, ready=True, models=(model_state("m", running=3),))
    for attempt in (*waiting, elsewhere):
        in_flight.add(attempt)
    task = asyncio.ensure_future(silence.run())
    try:
        await until(lambda: runtime.looks > 2)
        assert not silence.is_mute
        runtime.snapshot = snapshot
        await until(lambda: silence.is_mute)
        assert all(attempt.is_lost for attempt in waiting)
        assert not elsewhere.is_lost
    finally:
        task.cancel()


async def test_runtime_silence_of_a_foreign_runtime_is_long_beside_its_answers() -> None:
    runtime, in_flight = Runtime(), InFlight()
    runtime.foreign = True
    silence = RuntimeSilence("own", in_flight, Changes(), look=runtime.look, is_foreign=runtime.is_foreign)
    answered = attempt_at("own", age_s=20.0)
    in_flight.add(answered)
    answered.first_byte_s = answered.started_s + 0.5
    in_flight.remove(answered)
    for _ in range(3):
        in_flight.add(attempt_at("own", age_s=6.0))
    answered_s = time.monotonic()
    task = asyncio.ensure_future(silence.run())
    try:
        await until(lambda: silence.is_mute, 10)
        assert time.monotonic() - answered_s >= 4.9
        assert runtime.looks == 0
    finally:
        task.cancel()


def carried_of(num_active: int) -> CarriedAnswers:
    carried = CarriedAnswers()
    for age_s in (PATIENCE_S, 0.0):
        carried.note({"series": CarriedCount("m", num_active, num_active, 0)}, time.monotonic() - age_s)
    return carried


async def test_runtime_silence_counts_calls_past_the_mesh_and_doubts_the_runtime_until_an_answer() -> None:
    runtime, in_flight, carried = Runtime(), InFlight(), carried_of(3)
    silence = RuntimeSilence(
        "own", in_flight, Changes(), look=runtime.look, is_foreign=runtime.is_foreign, carried=carried
    )
    assert [silence.is_mute, silence.is_doubted] == [False, False]
    task = asyncio.ensure_future(silence.run())
    try:
        await until(lambda: silence.is_mute)
        await until(lambda: not silence.is_mute, 10)
        assert silence.is_doubted, "the calls that wait on are not held against it again, but nothing was answered"
        probe = attempt_at("own", age_s=0.0)
        in_flight.add(probe)
        probe.begin_response()
        in_flight.remove(probe)
        await until(lambda: not silence.is_doubted)
    finally:
        task.cancel()


@pytest.mark.parametrize("case", ["two calls", "model is busy", "refused calls are at the mesh", "foreign runtime"])
async def test_runtime_silence_suspects_nothing_without_three_carried_calls_that_wait(case: str) -> None:
    runtime, in_flight, carried = Runtime(), InFlight(), carried_of(2 if case == "two calls" else 3)
    runtime.foreign = case == "foreign runtime"
    silence = RuntimeSilence(
        "own",
        in_flight,
        Changes(),
        look=runtime.look,
        is_foreign=runtime.is_foreign,
        carried=carried,
        is_idle=lambda _: case != "model is busy",
    )
    if case == "refused calls are at the mesh":
        in_flight.add(attempt_at("peer", age_s=0.0))
    task = asyncio.ensure_future(silence.run())
    try:
        await until(lambda: runtime.turns > 5)
        assert not silence.is_mute
        assert not runtime.looks
    finally:
        task.cancel()
