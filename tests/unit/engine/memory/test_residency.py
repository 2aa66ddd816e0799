"""Victims are enough, none is needless, and none may run or be on its way in; cheap returns go before dear ones."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.memory.residency import Holder, choose_to_drain, choose_victims

NOW = 1000.0
HOLDERS = st.lists(
    st.builds(
        Holder,
        st.uuids().map(str),
        st.integers(1, 20),
        st.floats(0, NOW),
        st.floats(0, NOW),
        st.floats(0, 20),
        st.booleans(),
        st.integers(0, 2),
        st.integers(0, 2),
        st.booleans(),
        st.floats(0, 50),
    ),
    max_size=8,
    unique_by=lambda h: h.model_id,
)


def holder(
    name: str, *, slabs: int = 4, used_s: float = 900.0, since_s: float = 0.0, cost_s: float = 0.1, **more: object
) -> Holder:
    facts: dict[str, object] = {"swapping": False, "running": 0, "waiting": 0, **more}
    return Holder(name, slabs, used_s, since_s, cost_s, **facts)  # type: ignore[arg-type]


@given(HOLDERS, st.integers(1, 60))
def test_victims(holders: list[Holder], slabs: int) -> None:
    chosen = choose_victims(holders, slabs)
    may_go = {h.model_id: h for h in holders if not h.swapping and not h.running and (h.draining or not h.waiting)}
    if chosen is None:
        assert sum(h.slabs for h in may_go.values()) < slabs
        return
    assert set(chosen) <= set(may_go)
    freed = sum(may_go[name].slabs for name in chosen)
    assert freed >= slabs
    assert all(freed - may_go[name].slabs < slabs for name in chosen), "one of them went needlessly"


def test_least_recently_used_goes_first_among_equals() -> None:
    holders = [holder("new", used_s=990), holder("old", used_s=100), holder("mid", used_s=500)]
    assert choose_victims(holders, 4) == ["old"]


def test_residency_keeps_a_model_that_is_used_more() -> None:
    assert choose_victims([holder("often", used_s=800, use=9.0), holder("once", used_s=990, use=1.0)], 4) == ["once"]


def test_residency_weighs_a_slow_return_above_some_uses() -> None:
    from_disk = holder("from disk", used_s=800, cost_s=5.0, use=1.0)
    from_host = holder("from host", used_s=900, cost_s=0.3, use=3.0)
    assert choose_victims([from_disk, from_host], 4) == ["from host"]


@given(HOLDERS, st.integers(1, 60), st.floats(0, 100))
def test_draining_chooses_only_who_may_and_only_if_it_helps(holders: list[Holder], slabs: int, waited_s: float) -> None:
    chosen = choose_to_drain(holders, slabs, waited_s, 0.2, NOW)
    by_name = {h.model_id: h for h in holders}
    assert not any(by_name[name].swapping or by_name[name].draining for name in chosen)
    if chosen:
        assert waited_s >= 1.0
        freed = sum(h.slabs for h in holders if h.evictable or h.draining) + sum(by_name[name].slabs for name in chosen)
        assert freed >= slabs


def test_residency_evicts_a_busy_model_after_its_stay() -> None:
    busy = holder("busy", running=3, waiting=9, since_s=998.0, cost_s=2.0)
    assert choose_to_drain([busy], 4, 30.0, 2.0, NOW) == []
    assert choose_to_drain([busy], 4, 30.0, 2.0, NOW + 20) == ["busy"]
    assert choose_to_drain([busy], 4, 3.0, 2.0, NOW + 20) == []
