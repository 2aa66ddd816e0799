"""Extents of adapters over slabs: never two at one place, and exactly the slabs that are touched."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.adapters.extents import ALIGNMENT_BYTES, ExtentMap

SLAB = 4096


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * SLAB)), max_size=60))
def test_extents_do_not_overlap_and_count_their_slabs(actions: list[tuple[bool, int]]) -> None:
    extents = ExtentMap(SLAB, 8)
    held: dict[int, int] = {}
    free, used = list(range(20)), dict[int, int]()
    for takes, number in actions:
        if takes:
            placement = extents.find(number)
            if placement is None:
                continue
            slabs = [free.pop() for _ in placement.missing]
            extents.take(placement, number, slabs)
            used |= dict(zip(placement.missing, slabs, strict=True))
            held[placement.offset] = number
        elif held:
            offset = sorted(held)[number % len(held)]
            size = held.pop(offset)
            would_free = extents.freed_by(offset, size)
            freed = extents.release(offset, size)
            assert len(freed) == would_free
            for place, slab in freed.items():
                assert used.pop(place) == slab
                free.append(slab)
        taken = sorted(
            (offset, offset + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES) for offset, size in held.items()
        )
        assert all(before[1] <= after[0] for before, after in pairwise(taken))
        touched = {place for start, end in taken for place in range(start // SLAB, -(-end // SLAB))}
        assert touched == used.keys()
        assert extents.num_slabs == len(touched)


def test_extent_is_placed_where_it_needs_the_fewest_slabs() -> None:
    extents = ExtentMap(SLAB, 8)
    for size in (SLAB // 2, SLAB):
        placement = extents.find(size)
        assert placement is not None
        extents.take(placement, size, list(placement.missing))
    small = extents.find(SLAB // 4)
    assert small is not None
    assert small.missing == ()
    assert extents.find(9 * SLAB) is None


def test_extent_placement_that_is_no_longer_free_is_refused() -> None:
    extents = ExtentMap(SLAB, 2)
    placement = extents.find(100)
    assert placement is not None
    extents.take(placement, 100, [0])
    with pytest.raises(ValueError, match="are not free"):
        extents.take(placement, 100, [1])
