"""free + lent = total, whatever is asked of the pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.memory.slab_pool import SlabPool


@given(st.integers(0, 20), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8), st.booleans()), max_size=60))
def test_accounts_always_balance(total: int, asks: list[tuple[str, int, bool]]) -> None:
    pool = SlabPool(total)
    held: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for owner, count, borrow in asks:
        if borrow:
            lent = pool.lend(owner, count)
            assert (lent is None) == (count > total - sum(map(len, held.values())))
            held[owner] += lent or []
        else:
            back, held[owner] = held[owner][:count], held[owner][count:]
            pool.release(owner, back)
        pool.check()
        everything = [slab for slabs in held.values() for slab in slabs]
        assert len(set(everything)) == len(everything)
        assert pool.free == total - len(everything)
        assert all(pool.lent(name) == len(slabs) for name, slabs in held.items())


def test_slab_pool_takes_a_slab_back_from_its_owner_only() -> None:
    pool = SlabPool(2)
    slabs = pool.lend("a", 1)
    assert slabs is not None
    with pytest.raises(ValueError, match="lent to 'a', not to 'b'"):
        pool.release("b", slabs)
    pool.release("a", slabs)
    with pytest.raises(ValueError, match="None"):
        pool.release("a", slabs)


@given(st.integers(0, 12), st.integers(0, 12), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=40))
def test_slab_pool_has_memory_for_what_it_lends(total: int, at_first: int, asks: list[tuple[int, int]]) -> None:
    pool, lent = SlabPool(total, min(at_first, total)), list[int]()
    for kind, count in asks:
        before = pool.committed
        if kind == 0:
            lent += pool.lend("a", count) or []
        elif kind == 1:
            wanted = pool.uncommitted(count)
            assert len(wanted) == min(count, total - before)
            assert pool.uncommitted(count) == wanted
            pool.commit(wanted)
            assert pool.committed == before + len(wanted)
        else:
            free = pool.free
            gone = pool.decommit(count)
            assert len(gone) == min(count, free)
            assert not set(gone) & set(lent)
            assert pool.committed == before - len(gone)
        pool.check()
        assert pool.num_lent == len(lent) == len(set(lent)) == pool.committed - pool.free
