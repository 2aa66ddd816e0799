"""The choice of a group for a model: sizes first, then free memory, then the residents that must leave."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine_client.placement import GroupRoom, ResidentBytes, order_groups, refusal_of, victims

_residents = st.lists(
    st.builds(
        ResidentBytes, st.uuids().map(str), st.integers(1, 60), st.booleans(), st.floats(0, 100, allow_nan=False)
    ),
    max_size=4,
).map(tuple)


@st.composite
def _groups(draw: st.DrawFn) -> list[GroupRoom]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        budget, residents = draw(st.integers(20, 100)), draw(_residents)
        free = budget - sum(resident.device_bytes for resident in residents) - draw(st.integers(0, 30))
        found.append(GroupRoom(draw(st.sampled_from([1, 1, 2, 4])), budget, free, residents))
    return found


def _share(weight_bytes: int, group: GroupRoom) -> int:
    return -(-weight_bytes // group.size)


@given(_groups(), st.integers(0, 300), st.sampled_from(["auto", 1, 2, 4]))
def test_order_groups_offers_only_groups_that_suit(groups: list[GroupRoom], weight_bytes: int, wanted: object) -> None:
    order = order_groups(groups, weight_bytes, wanted)  # type: ignore[arg-type]
    allowed = [number for number, group in enumerate(groups) if wanted in ("auto", group.size)]
    able = [number for number in allowed if _share(weight_bytes, groups[number]) <= groups[number].budget_bytes]
    assert len(set(order)) == len(order)
    assert set(order) == set(able) if able else (len(order) == min(1, len(allowed)) and set(order) <= set(allowed))
    assert [groups[number].size for number in order] == sorted(groups[number].size for number in order)


@given(_groups(), st.integers(0, 300))
def test_order_groups_evicts_nothing_where_a_group_has_room(groups: list[GroupRoom], weight_bytes: int) -> None:
    order = order_groups(groups, weight_bytes, "auto")
    first = groups[order[0]]
    peers = [
        group for group in groups if group.size == first.size and _share(weight_bytes, group) <= group.budget_bytes
    ]
    roomy = [group.free_bytes for group in peers if group.free_bytes >= _share(weight_bytes, group)]
    if roomy:
        assert first.free_bytes == max(roomy)


@given(_groups(), st.integers(0, 300), st.randoms())
def test_order_groups_does_not_depend_on_the_order_of_equal_choices(
    groups: list[GroupRoom], weight_bytes: int, random: object
) -> None:
    shuffled = list(groups)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    best, same = (some[order_groups(some, weight_bytes, "auto")[0]] for some in (groups, shuffled))
    assert (best.size, best.free_bytes) == (same.size, same.free_bytes) or best.residents or same.residents


def test_order_groups_offers_the_emptier_of_the_largest_groups_where_none_suits() -> None:
    assert order_groups([GroupRoom(2, 20, 5), GroupRoom(2, 20, 9), GroupRoom(1, 20, 20)], 100, "auto") == [1]


def test_order_groups_prefers_the_least_recently_used_residents() -> None:
    full = GroupRoom(1, 100, 0, (ResidentBytes("new", 100, False, 9.0),))
    older = replace(full, residents=(ResidentBytes("old", 100, False, 2.0),))
    busy = replace(full, residents=(ResidentBytes("busy", 100, True, 1.0),))
    assert order_groups([full, busy, older], 50, "auto") == [2, 0, 1]


def test_order_groups_counts_loads_in_progress() -> None:
    """`free_bytes` is negative where more is awaited than the budget holds."""
    assert order_groups([GroupRoom(1, 100, -50), GroupRoom(1, 100, 0)], 60, "auto") == [1, 0]


@pytest.mark.parametrize(
    ("sizes", "wanted", "parts"),
    [
        ((1, 1, 2), 4, ("its tensor_parallel is 4", "sizes 1, 1, 2", "tensor_parallel 1 or 2 or auto", "contain 4")),
        ((1, 1, 2), 2, ()),
        ((1,), "auto", ()),
    ],
)
def test_refusal_of_names_the_groups(sizes: tuple[int, ...], wanted: object, parts: tuple[str, ...]) -> None:
    refusal = refusal_of(sizes, wanted)  # type: ignore[arg-type]
    assert bool(refusal) == bool(parts)
    assert all(part in refusal for part in parts)


def test_victims_are_idle_and_least_recently_used() -> None:
    residents = [
        ResidentBytes("new", 10, False, 9.0),
        ResidentBytes("busy", 10, True, 1.0),
        ResidentBytes("old", 10, False, 2.0),
    ]
    assert victims(5, 5, residents) == ([], 0)
    assert victims(12, 5, residents) == (["old"], 0)
    assert victims(40, 5, residents) == (["old", "new"], 15)
