"""Circuits of pods, the attempts that a lost pod ends, and what outcomes say about copies."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.changes import Changes
from mesh.routing.attempts import Attempt, Outcome
from mesh.routing.copy_health import CopyHealth, CopyRecord
from mesh.routing.in_flight import InFlight
from mesh.routing.peer_health import Circuit, PeerHealth, ProbeResult
from mesh.routing.retry_policy import Failure
from mesh.types import Target
from tests.support.waiting import until

results = st.lists(st.sampled_from(ProbeResult), max_size=20)


@given(results)
def test_circuit_opens_after_two_failures_and_closes_after_an_answer(ended: list[ProbeResult]) -> None:
    circuit, in_a_row = Circuit(), 0
    for now_s, result in enumerate(ended, 1):
        circuit = circuit.after(result, float(now_s))
        in_a_row = 0 if result is ProbeResult.ANSWERED else in_a_row + 1
        assert circuit.is_usable == (in_a_row == 0)
        refused_first = in_a_row >= 1 and ended[now_s - in_a_row] is ProbeResult.REFUSED
        assert circuit.is_open == (in_a_row >= 2 or refused_first)
        assert now_s <= circuit.probe_at_s <= now_s + 5


def attempt_at(instance_id: str, *, local: bool = False) -> Attempt:
    return Attempt("m", Target(instance_id, local, "grpc", "http"))


async def lost(attempt: Attempt) -> bool:
    try:
        async with attempt.until_lost():
            await asyncio.sleep(10)
    except TimeoutError:
        return True
    return False


async def test_in_flight_loses_only_attempts_at_the_target_without_a_response() -> None:
    in_flight = InFlight()
    waiting, begun, elsewhere = attempt_at("p"), attempt_at("p"), attempt_at("q")
    for attempt in (waiting, begun, elsewhere):
        in_flight.add(attempt)
    begun.begin_response()
    tasks = [asyncio.ensure_future(lost(attempt)) for attempt in (waiting, begun, elsewhere)]
    await asyncio.sleep(0)
    assert in_flight.lose("p", committed=False) == 1
    assert await tasks[0]
    assert not tasks[1].done()
    assert in_flight.lose("p", committed=True) == 2
    assert await tasks[1]
    assert not tasks[2].done()
    tasks[2].cancel()
    for attempt in (waiting, begun, elsewhere):
        in_flight.remove(attempt)
    assert in_flight.targets() == []


async def test_peer_health_does_not_wait_for_an_attempt_lost_before() -> None:
    attempt = attempt_at("p")
    attempt.lose()
    assert await lost(attempt)


@pytest.mark.parametrize("is_lost_before", [False, True])
def test_peer_health_cancels_the_call_of_a_lost_attempt(is_lost_before: bool) -> None:
    attempt, cancelled = attempt_at("p"), []
    if is_lost_before:
        attempt.lose()
    attempt.cancel_when_lost(lambda: cancelled.append("p"))
    assert bool(cancelled) is is_lost_before
    if not is_lost_before:
        attempt.lose()
    assert cancelled == ["p"]
    assert attempt.outcome is Outcome.FAILED


class ScriptedProbe:
    def __init__(self) -> None:
        self.result = ProbeResult.ANSWERED
        self.addresses: list[str] = []

    async def probe(self, http_address: str) -> ProbeResult:
        self.addresses.append(http_address)
        await asyncio.sleep(0)
        return self.result


@contextmanager
def running(health: PeerHealth) -> Iterator[None]:
    task = asyncio.ensure_future(health.run())
    try:
        yield
    finally:
        task.cancel()


@pytest.mark.parametrize(("has_record", "expect_cut"), [(True, False), (False, True)])
async def test_peer_health_of_a_silent_pod_loses_attempts_that_have_not_begun(
    has_record: bool, expect_cut: bool
) -> None:
    probe, in_flight = ScriptedProbe(), InFlight()
    health = PeerHealth(
        probe, in_flight, Changes(), address_of=lambda _: "x:1" if has_record else None, gone_after_s=1000
    )
    waiting, begun = attempt_at("p"), attempt_at("p")
    begun.begin_response()
    in_flight.add(waiting)
    in_flight.add(begun)
    with running(health):
        await until(lambda: probe.addresses)
        assert not waiting.is_lost
        probe.result = ProbeResult.SILENT
        assert await asyncio.wait_for(lost(waiting), 5)
        assert not health.is_usable("p")
        assert begun.is_lost == expect_cut
        probe.result = ProbeResult.ANSWERED
        await until(lambda: health.is_usable("p"), 10)


async def test_local_attempts_and_pods_that_shut_down_are_not_probed() -> None:
    probe, in_flight = ScriptedProbe(), InFlight()
    probe.result = ProbeResult.REFUSED
    # An empty address stands for a pod that shuts down.
    health = PeerHealth(probe, in_flight, Changes(), address_of=lambda pod: "q:1" if pod == "q" else "", gone_after_s=0)
    own, leaving, probed = attempt_at("own", local=True), attempt_at("p"), attempt_at("q")
    for attempt in (own, leaving, probed):
        in_flight.add(attempt)
    with running(health):
        await until(lambda: len(probe.addresses) >= 2)
    assert set(probe.addresses) == {"q:1"}
    assert not own.is_lost
    assert not leaving.is_lost


@given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 10)), max_size=30))
def test_copy_record_is_ejected_after_three_failures_in_a_row(outcomes: list[tuple[bool, float]]) -> None:
    record, in_a_row = CopyRecord(), 0
    for now_s, (answered, latency_s) in enumerate(outcomes):
        record = record.answered(latency_s, now_s) if answered else record.failed(now_s)
        in_a_row = 0 if answered else in_a_row + 1
        if in_a_row < 3:
            assert not record.is_ejected(now_s)
        elif in_a_row == 3:
            assert record.is_ejected(now_s)
    measured = [latency_s for answered, latency_s in outcomes if answered]
    if measured and not in_a_row:
        assert min(measured) - 1e-9 <= record.latency_s <= max(measured) + 1e-9


def test_copy_record_lets_one_request_probe_after_its_ejection() -> None:
    record = CopyRecord()
    for _ in range(3):
        record = record.failed(0.0)
    assert record.is_ejected(4.9)
    assert not record.is_ejected(5.1)
    probed = record.probed(5.1)
    assert probed.is_ejected(5.2)
    assert probed.answered(0.1, 5.3).is_ejected(5.3) is False
    again = record.failed(5.1)
    assert again.ejected_until_s - 5.1 > 5.0, "the next ejection is longer"


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.floats(0, 100))
def test_copy_record_is_held_against_a_slow_copy_for_a_while(best_s: float, latency_s: float, later_s: float) -> None:
    record = CopyRecord()
    for _ in range(3):
        record = record.answered(latency_s, 0.0)
    excess_s = record.excess_s(best_s, later_s)
    assert 0 <= excess_s <= max(0.0, latency_s - best_s) + 1e-9
    assert record.excess_s(best_s, later_s + 10) <= excess_s
    if latency_s < best_s:
        assert excess_s == 0


def test_copy_health_takes_outcomes_into_account() -> None:
    health = CopyHealth()
    answered, failed, left = attempt_at("p"), attempt_at("q"), attempt_at("r")
    answered.begin_response()
    failed.failure = Failure.UNAVAILABLE
    assert (answered.outcome, failed.outcome, left.outcome) == (Outcome.ANSWERED, Outcome.FAILED, Outcome.ABANDONED)
    for _ in range(3):
        for attempt in (answered, failed, left):
            health.record(attempt)
    now_s = time.monotonic()
    assert [health.of("m", pod).is_ejected(now_s) for pod in "pqr"] == [False, True, False]
    left.started_s -= 3.0  # a caller that has waited for long before it left
    for _ in range(3):
        health.record(left)
    assert health.of("m", "r").is_ejected(time.monotonic())


def test_copy_health_failures_at_several_copies_eject_their_pod_until_one_answers() -> None:
    health, target = CopyHealth(), Target("p", False, "grpc", "http")
    for model_id in ("m0", "m1", "m2"):
        failed = Attempt(model_id, target)
        failed.failure = Failure.UNAVAILABLE
        health.record(failed)
    now_s = time.monotonic()
    assert not health.of("m3", "p").is_ejected(now_s)
    assert health.is_ejected("m3", "p", now_s)
    assert not health.is_ejected("m3", "q", now_s)
    answered = Attempt("m1", target)
    answered.begin_response()
    health.record(answered)
    assert not health.is_ejected("m3", "p", now_s)
