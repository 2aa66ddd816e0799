"""Room, pods, load times and the choice of a copy: properties of the mesh's pure policies."""

from hypothesis import assume, given
from hypothesis import strategies as st

from common.model_state import CopyState, ModelState, Tier
from mesh.placement.eviction import eviction_order, plan_eviction
from mesh.placement.load_times import LoadTimes, remaining_s, retry_after_s
from mesh.placement.model_status import status_of
from mesh.placement.usage import ModelUsage, Usage
from mesh.registry.records import Failure, InstanceRecord, ModelRecord
from mesh.routing.copy_selection import AFFINITY_S, Candidate, choose, expected_wait_s
from mesh.types import ModelStatus

HELD = st.builds(
    ModelUsage,
    model_id=st.uuids().map(str),
    size_bytes=st.integers(0, 100),
    last_used_ms=st.integers(0, 1000),
    num_users=st.integers(0, 2),
    is_unloading=st.booleans(),
    is_loading=st.booleans(),
    use=st.floats(0, 10),
    priority=st.integers(-1, 1),
    is_pinned=st.booleans(),
)
USAGES = st.builds(
    lambda model, slack: Usage(sum(item.size_bytes for item in model) + slack, tuple(model)),
    st.lists(HELD, max_size=8),
    st.integers(0, 150),
)


@given(USAGES, st.integers(1, 300), st.booleans())
def test_room_is_made_by_idle_models_least_used_first(usage: Usage, need_bytes: int, spare_busy: bool) -> None:
    room = plan_eviction(usage, "new", need_bytes, spare_busy=spare_busy)
    model = {item.model_id: item for item in usage.models}
    victims = [model[model_id] for model_id in room.victims]
    assert room.never_fits == (need_bytes > usage.capacity_bytes)
    if room.never_fits:
        assert not victims
        return
    assert not any(victim.is_unloading or victim.is_loading for victim in victims)
    assert not room.declined
    if not room.wait:
        assert usage.used_bytes + need_bytes <= usage.capacity_bytes
        return
    assert usage.used_bytes + need_bytes > usage.capacity_bytes
    short = usage.used_bytes - usage.unloading_bytes + need_bytes - usage.capacity_bytes
    if victims:
        freed = sum(victim.size_bytes for victim in victims)
        assert freed >= short
        # none too many
        assert all(freed - victim.size_bytes < short for victim in victims[:-1])
    in_use = [victim for victim in victims if victim.num_users]
    idle = [
        item
        for item in usage.models
        if not (item.num_users or item.is_unloading or item.is_loading or item.is_pinned or not item.size_bytes)
    ]
    idle_bytes = sum(item.size_bytes for item in idle)
    assert not any(victim.is_pinned for victim in victims)
    if spare_busy or idle_bytes >= short:
        assert not in_use
    if idle_bytes >= short > 0:
        assert victims
        # whatever is spared although it comes before the last victim was not needed
        last = max(eviction_order(victim) for victim in victims)
        for item in idle:
            if item not in victims and eviction_order(item) < last:
                assert freed - short < sum(
                    victim.size_bytes for victim in victims if eviction_order(victim) > eviction_order(item)
                )


@given(USAGES, st.integers(1, 300), st.integers(0, 1000))
def test_policy_displaces_no_younger_model_for_an_old_one(usage: Usage, need_bytes: int, last_used_ms: int) -> None:
    room = plan_eviction(usage, "new", need_bytes, last_used_ms=last_used_ms)
    model = {item.model_id: item for item in usage.models}
    assert all(model[model_id].last_used_ms < last_used_ms for model_id in room.victims)
    if room.declined:
        older = sum(
            item.size_bytes
            for item in usage.models
            if item.last_used_ms < last_used_ms and not (item.is_unloading or item.is_loading or item.is_pinned)
        )
        assert usage.used_bytes - usage.unloading_bytes - older + need_bytes > usage.capacity_bytes


def test_policy_waits_for_room_that_comes_free_and_ignores_an_own_entry() -> None:
    usage = Usage(
        100,
        (ModelUsage("a", 60, 1, is_unloading=True), ModelUsage("b", 30, 2), ModelUsage("new", 50, 3, is_loading=True)),
    )
    assert plan_eviction(usage, "new", 60).victims == ()
    assert plan_eviction(usage, "new", 60).wait
    assert plan_eviction(Usage(100, (ModelUsage("new", 100, 1),)), "new", 100) == plan_eviction(Usage(100), "new", 100)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.floats(0.01, 100)), max_size=10))
def test_load_times_stay_within_what_was_measured(loads: list[tuple[str, int, float]]) -> None:
    times = LoadTimes()
    for model_id, size_bytes, seconds in loads:
        times = times.measured(model_id, size_bytes, seconds)
    for model_id in "abc":
        own = [seconds for at, _, seconds in loads if at == model_id]
        if own:
            assert min(own) - 1e-6 <= times.expected_s(model_id) <= max(max(own), 0.05) + 1e-6
    assert times.expected_s("unknown") > 0
    assert times.expected_s("unknown", 50) > 0


@given(st.floats(0.1, 1000), st.floats(0, 1000), st.floats(0, 1))
def test_policy_gives_positive_waits_that_clients_honour(expected_s: float, elapsed_s: float, progress: float) -> None:
    left_s = remaining_s(expected_s, elapsed_s, progress)
    assert left_s > 0
    assert 1 <= retry_after_s(left_s) <= 120


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        instance_id=st.uuids().map(str),
        local=st.booleans(),
        tier=st.sampled_from(Tier),
        loading_s=st.one_of(st.just(0.0), st.floats(0.1, 60)),
        swap_in_s=st.floats(0, 5),
        running=st.integers(0, 300),
        waiting=st.integers(0, 100),
        in_flight=st.integers(0, 300),
        kv_usage=st.floats(0, 1),
    ),
    max_size=6,
)


@given(CANDIDATES, st.text(max_size=8))
def test_policy_chooses_the_least_wait_but_for_affinity(candidates: list[Candidate], prefix: str) -> None:
    chosen = choose(candidates, prefix)
    assert (chosen is None) == (not candidates)
    if chosen is None:
        return
    least = min(map(expected_wait_s, candidates))
    assert expected_wait_s(chosen) <= least + (AFFINITY_S if prefix else 0) + 1e-9
    assert choose(list(reversed(candidates)), prefix) == chosen


@given(CANDIDATES)
def test_policy_makes_no_copy_more_attractive_by_load(candidates: list[Candidate]) -> None:
    chosen = choose(candidates)
    assume(chosen is not None)
    assert chosen is not None
    from dataclasses import replace

    others = [replace(item, waiting=item.waiting + 5) if item is not chosen else item for item in candidates]
    assert choose(others) == chosen


def test_resident_before_host_before_disk_before_loading() -> None:
    tiers = [
        Candidate("a", True, loading_s=5),
        Candidate("b", True, tier=Tier.DISK),
        Candidate("c", True, tier=Tier.HOST),
        Candidate("d", False),
    ]
    for left in range(4, 0, -1):
        chosen = choose(tiers[:left])
        assert chosen is not None
        if left > 2:
            assert chosen.instance_id == tiers[left - 1].instance_id


@given(st.text(min_size=1), CANDIDATES)
def test_policy_sends_a_prompt_where_it_went_before(prefix: str, candidates: list[Candidate]) -> None:
    equal = [Candidate(item.instance_id, True) for item in candidates]
    chosen = choose(equal, prefix)
    for item in equal:
        if item != chosen:
            assert choose([other for other in equal if other != item], prefix) == chosen


PEERS = {
    "p": InstanceRecord(grpc_address="x:1", copies={"m": ModelState(state=CopyState.LOADED)}),
    "q": InstanceRecord(grpc_address="y:1"),
}


def test_status_over_pods() -> None:
    def status(record: ModelRecord | None) -> ModelStatus:
        return status_of("m", record, own_id="me", own=None, own_model=None, pods=PEERS).status

    assert status(None) is ModelStatus.NOT_FOUND
    assert status(ModelRecord()) is ModelStatus.NOT_LOADED
    assert status(ModelRecord(instance_ids={"gone": 1})) is ModelStatus.NOT_LOADED
    assert status(ModelRecord(instance_ids={"q": 1})) is ModelStatus.LOADING
    assert status(ModelRecord(instance_ids={"p": 1, "q": 2})) is ModelStatus.LOADED
    failed = ModelRecord(failed_in={"p": 1, "q": 2}, failures={"p": Failure("old"), "q": Failure("new")})
    info = status_of("m", failed, own_id="me", own=None, own_model=None, pods=PEERS)
    assert (info.status, info.errors) == (ModelStatus.LOADING_FAILED, ("new", "old"))
