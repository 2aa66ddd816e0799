"""Models get equal device time, whatever a step costs, and none waits longer than a round."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.scheduler.model_round_robin import RoundRobin


@given(st.lists(st.floats(10, 900), min_size=1, max_size=5))
def test_round_robin_shares_are_equal(costs: list[float]) -> None:
    turns = RoundRobin(1000)
    cost_us = {f"m{i}": cost for i, cost in enumerate(costs)}
    names = list(cost_us)
    used_us = dict.fromkeys(names, 0.0)
    rounds = 60
    while sum(used_us.values()) < rounds * 1000 * len(names):
        name = turns.pick(names)
        assert name is not None
        turns.charge(name, cost_us[name])
        used_us[name] += cost_us[name]
    for name in names:
        assert abs(used_us[name] - rounds * 1000) <= 3 * (1000 + cost_us[name])


@given(st.lists(st.floats(1, 5000), min_size=2, max_size=6))
def test_round_robin_bounds_the_wait_for_a_turn(costs: list[float]) -> None:
    quantum_us = 1000.0
    turns = RoundRobin(quantum_us)
    cost_us = {f"m{i}": cost for i, cost in enumerate(costs)}
    since_us = dict.fromkeys(cost_us, 0.0)
    # a model may spend a quantum and overshoot it by one step, in its own round and while it pays its debt off
    rounds = max(costs) / quantum_us + 2
    bound_us = rounds * sum(quantum_us + cost for cost in costs)
    for _ in range(500):
        name = turns.pick(list(cost_us))
        assert name is not None
        assert since_us[name] <= bound_us
        since_us[name] = 0.0
        turns.charge(name, cost_us[name])
        for other in since_us:
            if other != name:
                since_us[other] += cost_us[name]


def test_equal_models_alternate() -> None:
    turns = RoundRobin(1000)
    picks = []
    for _ in range(20):
        name = turns.pick(["a", "b"])
        assert name is not None
        turns.charge(name, 100)
        picks.append(name)
    assert all(x != y for x, y in itertools.pairwise(picks))


def test_debts_are_paid_off_in_absence_and_idleness_earns_nothing() -> None:
    turns = RoundRobin(1000)
    turns.pick(["a", "b"])
    turns.charge("a", 5500)
    for _ in range(3):
        assert turns.pick(["b"]) == "b"
        turns.charge("b", 1000)
    assert [turns.pick(["a", "b"]) for _ in range(3)] == ["b", "b", "b"]  # two rounds have paid 2000 of 4500
    for _ in range(50):
        assert turns.pick(["b"]) == "b"
        turns.charge("b", 1000)
    assert turns.pick(["a", "b"]) == "a"
    assert turns.credit_us("a") == 1000
    assert turns.pick([]) is None
