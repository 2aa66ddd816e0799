"""Where models are loaded, when a failed one is tried again, and what is evicted first: properties of the pure policies."""

import itertools
import math
from collections import Counter
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from common.decayed_uses import DecayedUses
from mesh.placement.failures import MAX_FAILURES, SeenTimes, backoff_s, blocked_for_s, num_failures, wait_s
from mesh.placement.plan import PodView, plan
from mesh.registry.records import ModelRecord

views = st.builds(
    PodView,
    instance_id=st.uuids().map(str),
    local=st.just(False),
    capacity_bytes=st.integers(1, 100),
    free_bytes=st.integers(0, 100),
    victim_use=st.floats(0, 50),
    num_loading=st.integers(0, 5),
    loading_threads=st.integers(1, 4),
    load_failures=st.integers(0, 4),
    num_preferred=st.integers(0, 2),
    has_files=st.booleans(),
    has_base=st.booleans(),
    base_bytes=st.integers(0, 50),
    has_copy_in_zone=st.booleans(),
).map(lambda view: replace(view, free_bytes=min(view.free_bytes, view.capacity_bytes)))
pods = st.lists(views, max_size=6)


@given(pods, st.integers(0, 100), st.floats(0.01, 600))
def test_plan_orders_all_pods_that_are_large_enough(given_pods: list[PodView], size_bytes: int, load_s: float) -> None:
    order = plan(given_pods, "m", size_bytes, load_s=load_s)
    by_id = {pod.instance_id: pod for pod in given_pods}
    assert set(order) == {pod.instance_id for pod in given_pods if pod.capacity_bytes >= size_bytes + pod.base_bytes}
    assert plan(list(reversed(given_pods)), "m", size_bytes, load_s=load_s) == order
    failing = [by_id[pod_id].load_failures >= 2 for pod_id in order]
    assert failing == sorted(failing), "pods whose loads fail are last"
    for first, second in itertools.pairwise(order):
        one, two = by_id[first], by_id[second]
        if failing[order.index(first)] == failing[order.index(second)]:
            assert one.num_preferred >= two.num_preferred


@given(views, st.floats(0.01, 600))
def test_plan_prefers_files_room_and_idle_pods(pod: PodView, load_s: float) -> None:
    assume(pod.capacity_bytes > 20 + pod.base_bytes)
    full = replace(pod, free_bytes=0, load_failures=0)
    for better in (
        replace(full, instance_id="b", has_files=True),
        replace(full, instance_id="b", free_bytes=full.capacity_bytes),
        replace(full, instance_id="b", num_preferred=full.num_preferred + 1),
    ):
        worse = replace(full, instance_id="a", has_files=False, num_loading=full.num_loading + 1)
        assert plan([worse, better], "m", 10, load_s=load_s)[0] == "b"


def test_plan_spreads_models_over_pods() -> None:
    """The called pod is one of four: it must not get everything."""
    free = dict.fromkeys("abcd", 120)
    landed: Counter[str] = Counter()
    for number in range(40):
        fleet = [PodView(pod_id, pod_id == "a", 120, free[pod_id]) for pod_id in free]
        chosen = plan(fleet, f"m{number}", 10, load_s=10.0)[0]
        free[chosen] -= 10
        landed[chosen] += 1
    assert max(landed.values()) <= 12
    assert min(landed.values()) >= 8


def test_plan_sends_models_that_are_loaded_at_once_to_different_full_pods() -> None:
    fleet = [PodView(pod_id, False, 120, 0, victim_use=0.5) for pod_id in "abcd"]
    landed = Counter(plan(fleet, f"m{number}", 10, load_s=10.0)[0] for number in range(200))
    assert min(landed.values()) > 20


ages = st.dictionaries(st.sampled_from("pqr"), st.floats(0, 2000))


@given(st.integers(0, 30), ages, st.floats(0.1, 600))
def test_failures_never_block_for_longer_than_the_backoff(
    failures: int, ages_s: dict[str, float], expiry_s: float
) -> None:
    pause_s = backoff_s(failures, expiry_s)
    assert expiry_s <= pause_s <= max(900.0, expiry_s)
    assert backoff_s(failures + 1, expiry_s) >= pause_s
    for pod_id in "pqrs":
        wait = wait_s(failures, ages_s, pod_id, expiry_s)
        assert 0 <= wait <= pause_s
        if pod_id not in ages_s and failures < MAX_FAILURES:
            assert wait == 0, "another pod tries at once"
        if failures >= MAX_FAILURES and ages_s and min(ages_s.values()) < pause_s:
            assert wait > 0, "after three failures all pods wait"
    assert blocked_for_s(failures, ages_s, {"p", "s"}, expiry_s) <= pause_s


def test_failures_are_counted_over_pods_and_at_least_once_each() -> None:
    assert num_failures(ModelRecord()) == 0
    assert num_failures(ModelRecord(failed_in={"p": 1, "q": 1})) == 2
    assert num_failures(ModelRecord(failed_in={"p": 1}, num_failures=7)) == 7


@given(st.dictionaries(st.sampled_from("pqr"), st.integers(-(10**15), 10**15)))
def test_seen_times_do_not_depend_on_the_clocks_of_others(entries: dict[str, int]) -> None:
    seen = SeenTimes()
    first = seen.ages_s("m", entries)
    assert all(0 <= age_s < 1 for age_s in first.values())
    changed = {pod_id: value + 1 for pod_id, value in entries.items()}
    later = seen.ages_s("m", entries)
    assert all(later[pod_id] >= first[pod_id] for pod_id in entries)
    assert all(age_s < 1 for age_s in seen.ages_s("m", changed).values())
    assert seen.ages_s("m", {}) == {}


@given(st.lists(st.sampled_from("abcde"), max_size=300))
def test_uses_grow_with_each_use_and_fade_with_those_of_others(calls: list[str]) -> None:
    uses = DecayedUses(half_life_uses=10)
    for model_id in calls:
        before = {other: uses.of(other) for other in "abcde"}
        uses.add(model_id)
        assert uses.of(model_id) > before[model_id] * 0.9
        assert all(uses.of(other) <= before[other] for other in "abcde" if other != model_id)
    total = sum(uses.of(model_id) for model_id in "abcde")
    assert total <= min(len(calls), 15)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=20))
def test_uses_counted_at_once_are_those_counted_one_by_one(calls: list[tuple[str, int]]) -> None:
    at_once, one_by_one = DecayedUses(half_life_uses=10), DecayedUses(half_life_uses=10)
    for model_id, count in calls:
        at_once.add(model_id, count)
        for _ in range(count):
            one_by_one.add(model_id)
    for model_id in "abc":
        assert math.isclose(at_once.of(model_id), one_by_one.of(model_id), abs_tol=1e-9)


def test_uses_prefer_the_frequent_to_the_recent_until_it_ages() -> None:
    uses = DecayedUses(half_life_uses=10)
    for _ in range(5):
        uses.add("frequent")
    uses.add("recent")
    assert uses.of("frequent") > uses.of("recent")
    for _ in range(100):
        uses.add("other")
    uses.add("recent")
    assert uses.of("frequent") < uses.of("recent")
