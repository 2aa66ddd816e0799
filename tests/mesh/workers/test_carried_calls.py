"""Where a worker sends each call, and that its figures count every call to a copy once."""

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mesh.envoy.plan import Carrier
from mesh.routing.attempts import Attempts
from mesh.routing.in_flight import InFlight
from mesh.routing.retry_policy import Failure
from mesh.types import Target
from mesh.workers.carried_calls import CarriedCalls
from mesh.workers.messages import CarriedCopy, EndedCalls, Table

LOCAL = Target("pod", True, "unix:runtime", "unix:runtime-http")
CONTROL = Target("control", False, "unix:control", "unix:control-http", is_control=True)
NAMES = ("m", "n")


def table(generation: int, *names: str, removed: tuple[str, ...] = ()) -> Table:
    copies = {f"grpc/{name}": CarriedCopy(Carrier.GRPC, name, f"{name}-1", f"stat-{name}") for name in names}
    return Table(generation, copies, tuple(f"grpc/{name}" for name in removed), is_foreign=False, logs_requests=True)


def carrying(*names: str, is_mute: bool = False) -> CarriedCalls:
    calls = CarriedCalls(LOCAL, CONTROL, InFlight(), lambda: is_mute)
    calls.apply(table(1, *names))
    return calls


async def targets(calls: CarriedCalls, name: str, *failures: Failure | None) -> list[str]:
    """Make a call whose attempts fail in this way, and return where they went."""
    seen: list[str] = []
    with calls.attempts(Carrier.GRPC, name) as attempts:
        async for attempt in attempts:
            attempt.failure = failures[len(seen)] if len(seen) < len(failures) else None
            seen.append(attempt.target.instance_id)
    return seen


async def test_call_goes_to_the_copy_and_after_a_refusal_to_control() -> None:
    calls = carrying("m")
    assert await targets(calls, "m") == ["pod"]
    for failure in (Failure.MODEL_LOST, Failure.UNAVAILABLE):
        assert await targets(calls, "m", failure) == ["pod", "control"]
    assert await targets(calls, "n") == ["control"], "a name that is not in the table"
    assert await targets(calls, "") == ["control"]
    calls.apply(table(2, removed=("m",)))
    assert await targets(calls, "m") == ["control"]


async def test_copy_that_fails_three_times_in_a_row_is_ejected() -> None:
    calls = carrying("m")
    for _ in range(3):
        assert await targets(calls, "m", Failure.UNAVAILABLE) == ["pod", "control"]
    assert await targets(calls, "m") == ["control"]


async def test_no_call_goes_to_a_mute_runtime() -> None:
    assert await targets(carrying("m", is_mute=True), "m") == ["control"]


def test_ended_calls_of_keys_are_reported_once() -> None:
    calls = carrying()
    for code in ("OK", "OK", "CANCELLED"):
        calls.count_key("chat", Carrier.GRPC, code)
    expected = (EndedCalls("chat", Carrier.GRPC, "OK", 2), EndedCalls("chat", Carrier.GRPC, "CANCELLED", 1))
    assert calls.figures(1).keys == expected
    assert calls.figures(2).keys == ()


STEPS = st.lists(st.tuples(st.sampled_from(("begin", "end", "report", "remove", "add")), st.sampled_from(NAMES)))


@given(STEPS)
def test_figures_count_each_call_once_whatever_happens_to_its_copy(steps: list[tuple[str, str]]) -> None:
    asyncio.run(_live(steps))


async def _live(steps: list[tuple[str, str]]) -> None:
    calls, listed = carrying(*NAMES), set(NAMES)
    running: dict[str, list[Attempts]] = {name: [] for name in NAMES}
    begun, reported = Counter[str](), Counter[str]()

    def report() -> None:
        figures = calls.figures(1).copies
        for stat_name, reported_copy in figures.items():
            reported[stat_name] += reported_copy.begun
        for name in NAMES:
            copy = figures.get(f"stat-{name}")
            assert (copy.active if copy is not None else 0) == len(running[name])

    for step, name in steps:
        match step:
            case "begin":
                attempts = calls.attempts(Carrier.GRPC, name)
                is_local = (await anext(attempts)).target.local
                assert is_local is (name in listed)
                if is_local:
                    begun[f"stat-{name}"] += 1
                    running[name].append(attempts)
            case "end" if running[name]:
                running[name].pop().__exit__(None, None, None)
            case "report":
                report()
            case "remove":
                listed.discard(name)
                calls.apply(table(2, removed=(name,)))
            case "add":
                listed.add(name)
                calls.apply(table(2, name))
    report()
    assert reported == begun
