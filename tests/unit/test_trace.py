"""A small trace in virtual time: every request is answered, the same way each time, and ahead of one vLLM that sleeps and wakes."""

from bench.trace import belady_hit_rate, byte_hit_rate, make_models, make_trace, run_engine, run_vllm
from common.units import GIB

MODELS = make_models(12)
TRACE = make_trace(list(MODELS), seconds=20.0, rate=2.0, alpha=0.9, cv=4.0)
BUDGETS = (24 * GIB, 48 * GIB)


def test_trace_is_served_whole_and_the_same_each_time() -> None:
    first, again = (run_engine(MODELS, TRACE, *BUDGETS, overlap=True) for _ in range(2))
    assert [one.end_s for one in first.served] == [one.end_s for one in again.served]
    assert max(one.ttft_s for one in first.served) < 30.0
    assert {one.tier for one in first.served} >= {"device", "host"}


def test_trace_hits_most_of_what_belady_hits() -> None:
    outcome = run_engine(MODELS, TRACE, *BUDGETS, overlap=True)
    best = belady_hit_rate(MODELS, TRACE, BUDGETS[0], outcome.resident_at_start)
    assert byte_hit_rate(MODELS, outcome) > 0.8 * best


def test_engine_answers_twice_as_many_in_time_as_one_vllm() -> None:
    engine = run_engine(MODELS, TRACE, *BUDGETS, overlap=True)
    peer = run_vllm(MODELS, TRACE)
    assert sum(one.is_good for one in engine.served) >= 2 * sum(one.is_good for one in peer.served)


def test_hot_model_returns_to_the_host_tier() -> None:
    """The host tier has room for some models only. A model that was loaded first and is used most ends up in it or on the device."""
    trace = [one for one in make_trace(list(MODELS), 30.0, 1.0, 0.5, 1.0) if one.model_id != "m00"]
    hot = [type(trace[0])(float(at), "m00", 64, 4) for at in range(10, 30)]
    outcome = run_engine(MODELS, sorted([*trace, *hot], key=lambda one: one.at_s), 20 * GIB, 24 * GIB, overlap=True)
    later = [one.tier for one in outcome.served if one.request.model_id == "m00"][5:]
    assert "disk" not in later
