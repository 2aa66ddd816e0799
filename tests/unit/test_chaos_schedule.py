"""When bench.chaos breaks and mends a mesh, and to which fault it counts each call."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos import weights_with_failing
from bench.faults import CALM, FAULTS, Fault, by_fault, last_bad_s, possible, schedule
from bench.ledger import Call, Outcome, judged, summarise

faults = st.lists(st.sampled_from(FAULTS), min_size=1, max_size=len(FAULTS), unique=True)
calls = st.lists(
    st.builds(
        Call,
        number=st.integers(0, 1000),
        model=st.sampled_from(["model1", "failing"]),
        sent_s=st.floats(0, 900),
        seconds=st.floats(0, 20),
        outcome=st.sampled_from(["OK", "INTERNAL", "UNAVAILABLE"]),
    ),
    max_size=50,
)


@given(faults, st.floats(480, 3600))
def test_schedule_gives_each_fault_calm_before_it_and_time_to_recover(chosen: Sequence[Fault], seconds: float) -> None:
    windows = schedule(chosen, seconds)
    assert [window.fault for window in windows] == list(chosen)
    end_s = 0.0
    for window in windows:
        assert window.cause_s - end_s >= 7.9
        assert window.mend_s - window.cause_s == pytest.approx(window.fault.lasts_s)
        assert window.end_s - window.mend_s >= 7.9
        end_s = window.end_s
    assert end_s == pytest.approx(seconds)


def test_schedule_refuses_a_run_that_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"need \d+\.\d minutes"):
        schedule(FAULTS, 60.0)


def test_possible_faults_depend_on_envoy_and_on_namespaces() -> None:
    plain = possible(with_envoy=False, with_network=False)
    every = possible(with_envoy=True, with_network=True)
    assert len(plain) == len(FAULTS) - 3
    assert list(every) == list(FAULTS)


@given(calls, faults)
def test_by_fault_counts_each_call_once(ledger: list[Call], chosen: Sequence[Fault]) -> None:
    windows = schedule(chosen, 900.0)
    parts = by_fault(ledger, windows)
    assert sorted(map(id, ledger)) == sorted(id(call) for part in parts.values() for call in part)
    for call in parts[CALM]:
        assert not any(window.cause_s <= call.sent_s < window.end_s for window in windows)


def test_by_fault_counts_a_call_that_is_in_flight_when_the_fault_comes() -> None:
    (window,) = schedule(FAULTS[:1], 60.0)
    ended = Call(0, "m", window.cause_s - 2, 1.0, "OK")
    caught = Call(1, "m", window.cause_s - 2, 15.0, Outcome.NO_ANSWER)
    parts = by_fault([ended, caught], [window])
    assert (parts[CALM], parts[window.fault.name]) == ([ended], [caught])
    assert last_bad_s(parts[window.fault.name], window) == pytest.approx(13.0)
    assert last_bad_s([ended], window) == 0.0


@pytest.mark.parametrize(
    ("model", "outcome", "expected"),
    [
        ("model1", "INTERNAL", "INTERNAL"),
        ("failing", "INTERNAL", "OK"),
        ("failing", "OK", "WRONG"),
        ("failing", "UNAVAILABLE", "UNAVAILABLE"),
    ],
)
def test_judged_expects_the_refusal_of_a_model_that_cannot_be_loaded(model: str, outcome: str, expected: str) -> None:
    assert judged(Call(0, model, 0.0, 0.1, outcome), {"failing"}, ["INTERNAL"]) == expected


@given(calls)
def test_summary_accounts_for_each_call(ledger: list[Call]) -> None:
    found = summarise(ledger)
    assert sum(found.outcomes.values()) == found.num_calls == len(ledger)
    assert found.num_failed == sum(call.outcome != Outcome.OK for call in ledger)
    assert found.max_s == max((call.seconds for call in ledger), default=0.0)


def test_weights_call_the_failing_model_in_its_window_only() -> None:
    windows = schedule(FAULTS, 1200.0)
    weights = weights_with_failing(windows)
    for window in windows:
        for at_s in (window.cause_s - 1, window.cause_s, window.mend_s):
            is_called = weights(at_s)[-1] > 0
            assert is_called == (window.fault.spoils_model and at_s == window.cause_s)
    spoiled = next(window for window in windows if window.fault.spoils_model)
    shares = weights(spoiled.cause_s)
    assert shares[-1] / sum(shares) == pytest.approx(0.1)
