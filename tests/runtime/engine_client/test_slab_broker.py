"""Which engine gets slabs of a shared device, and what leaves for it."""

import math
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.engine_client.slab_broker import EngineShare, IdleModel, ResizeOrder, plan_resizes

ONE, TWO, BOTH = ("gpu:0",), ("gpu:1",), ("gpu:0", "gpu:1")
CAPACITY = {"gpu:0": 20, "gpu:1": 20}


def planned(*engines: EngineShare, now_s: float = 0.0) -> list[ResizeOrder]:
    return plan_resizes(CAPACITY, engines, now_s)


def test_plan_resizes_gives_unallocated_slabs_at_once() -> None:
    pair = EngineShare(BOTH, needed=6, wanted=8)
    assert planned(EngineShare(ONE, held=12), EngineShare(TWO, held=5), pair) == [ResizeOrder(2, 8)]
    assert planned(EngineShare(ONE, held=14), EngineShare(TWO, held=5), pair) == [ResizeOrder(2, 6)]


def test_plan_resizes_counts_the_overhead_of_processes() -> None:
    single = EngineShare(ONE, held=10, needed=6, wanted=6)
    assert planned(single, EngineShare(BOTH, overhead=4)) == [ResizeOrder(0, 16)]
    assert planned(single, EngineShare(BOTH, overhead=5)) == []


def test_plan_resizes_takes_free_slabs_then_cached_ones_then_the_least_worth() -> None:
    models = (IdleModel("dear", 6, 9.0), IdleModel("cheap", 4, 1.0))
    one = EngineShare(ONE, held=20, free=3, cached=2, idle_models=models)
    two = EngineShare(TWO, held=20, free=15)
    assert planned(one, two, EngineShare(BOTH, needed=3)) == [ResizeOrder(0, 17), ResizeOrder(1, 17)]
    assert planned(one, two, EngineShare(BOTH, needed=5)) == [ResizeOrder(0, 15), ResizeOrder(1, 15)]
    assert planned(one, two, EngineShare(BOTH, needed=8)) == [ResizeOrder(0, 11, ("cheap",)), ResizeOrder(1, 12)]
    assert planned(one, two, EngineShare(BOTH, needed=10)) == [ResizeOrder(0, 9, ("dear",)), ResizeOrder(1, 10)]


def test_plan_resizes_evicts_on_all_devices_of_a_group_or_on_none() -> None:
    one = EngineShare(ONE, held=20, idle_models=(IdleModel("a", 10, 1.0),))
    two = EngineShare(TWO, held=20)  # all of it is busy
    assert planned(one, two, EngineShare(BOTH, needed=6)) == []


def test_plan_resizes_orders_victims_over_engines() -> None:
    pair = EngineShare(BOTH, held=10, idle_models=(IdleModel("pair", 8, 2.0),))
    other = EngineShare(TWO, held=10)
    single = EngineShare(ONE, held=10, needed=7)
    cheap, dear = (IdleModel("own", 8, worth) for worth in (1.0, 3.0))
    assert planned(replace(single, idle_models=(cheap,)), pair, other) == [ResizeOrder(0, 10, ("own",))]
    assert planned(replace(single, idle_models=(dear,)), pair, other) == [ResizeOrder(1, 2, ("pair",))]


def test_plan_resizes_drains_busy_models_after_the_patience() -> None:
    one, two = EngineShare(ONE, held=20), EngineShare(TWO, held=20, free=4)
    pair = EngineShare(BOTH, needed=6, since_s=10.0, swap_s=0.5)
    assert planned(one, two, pair, now_s=11.0) == []
    expected = [ResizeOrder(0, 14, drain=True), ResizeOrder(1, 14, drain=True)]
    assert planned(one, two, pair, now_s=11.6) == expected
    # An engine that has just got its slabs keeps them for as long.
    assert planned(replace(one, given_s=10.5), two, pair, now_s=11.6) == []
    # Rows that run already do not end the stays of others.
    assert planned(one, two, replace(pair, since_s=math.inf), now_s=1e6) == []


def test_plan_resizes_serves_the_longest_wait_first_and_keeps_room_for_it() -> None:
    old = EngineShare(BOTH, needed=18, since_s=1.0)
    young = EngineShare(ONE, held=4, needed=2, since_s=2.0)
    assert planned(young, EngineShare(TWO), old) == []
    assert planned(replace(young, since_s=0.5), EngineShare(TWO), old) == [ResizeOrder(0, 6)]


def test_plan_resizes_does_not_wait_for_what_no_device_can_hold() -> None:
    large = EngineShare(ONE, held=3, free=3, needed=15)
    pair = EngineShare(BOTH, overhead=3, needed=4, since_s=5.0)
    assert planned(large, EngineShare(TWO), pair) == [ResizeOrder(2, 4)]
    assert planned(replace(large, needed=14), EngineShare(TWO), pair) == [ResizeOrder(0, 17)]


def test_plan_resizes_takes_for_a_wish_only_what_is_free_beyond_others_wishes() -> None:
    wish = EngineShare(BOTH, wanted=4)
    two = EngineShare(TWO, held=20, free=10)
    assert planned(EngineShare(ONE, held=20, free=6, spare=3), two, wish) == []
    assert planned(EngineShare(ONE, held=20, free=7, spare=3), two, wish) == [ResizeOrder(0, 16), ResizeOrder(1, 16)]


def test_plan_resizes_brings_unused_slabs_home() -> None:
    home = EngineShare(ONE, held=5, is_home=True)
    assert planned(home, EngineShare(BOTH)) == [ResizeOrder(0, 20)]
    assert planned(home, EngineShare(BOTH, held=1)) == []


def test_plan_resizes_waits_for_engines_that_have_not_answered() -> None:
    pair = EngineShare(BOTH, needed=6)
    one = EngineShare(ONE, held=20, free=20)
    assert planned(one, EngineShare(TWO, held=20, free=20, is_ready=False), pair) == []
    assert planned(one, EngineShare(TWO, held=20, free=20), replace(pair, is_ready=False)) == []


def test_plan_resizes_evicts_only_own_models_for_an_engine_whose_driver_has_too_little() -> None:
    own = IdleModel("own", 4, 9.0)
    short = EngineShare(ONE, held=10, needed=3, since_s=1.0, can_get=False, is_home=True, idle_models=(own,))
    other = EngineShare(BOTH, held=4, idle_models=(IdleModel("other", 4, 1.0),))
    assert planned(short, other, now_s=100.0) == [ResizeOrder(0, 10, ("own",))]
    assert planned(replace(short, needed=5), other, now_s=100.0) == []
    assert (
        planned(replace(short, needed=0, wanted=3), other) == planned(replace(short, needed=0), EngineShare(BOTH)) == []
    )
    # It keeps no other engine waiting.
    later = replace(other, needed=2, since_s=2.0)
    assert planned(replace(short, needed=5), later, now_s=100.0) == [ResizeOrder(1, 6)]


@dataclass
class FakeEngine:
    """Holds models as a real engine does: it refuses to evict busy ones, and answers late."""

    devices: tuple[str, ...]
    is_home: bool
    committed: int = 0
    weights: dict[str, int] = field(default_factory=dict)  # resident models
    busy: set[str] = field(default_factory=set)
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)  # model → its slabs, since when
    pending: ResizeOrder | None = None
    given_s: float = float("-inf")

    @property
    def used(self) -> int:
        return sum(self.weights.values())

    def share(self) -> EngineShare:
        idle = tuple(
            IdleModel(name, slabs, float(len(name) + slabs))
            for name, slabs in self.weights.items()
            if name not in self.busy
        )
        free = self.committed - self.used
        lacks = {name: (slabs - free, since_s) for name, (slabs, since_s) in self.waiting.items() if slabs > free}
        needed = max((slabs for slabs, _ in lacks.values()), default=0)
        held = self.committed if self.pending is None else max(self.committed, self.pending.num_slabs)
        return EngineShare(
            self.devices,
            held=held,
            free=free,
            needed=needed,
            wanted=needed,
            since_s=min((since_s for _, since_s in lacks.values()), default=0.0),
            given_s=self.given_s,
            idle_models=idle,
            is_ready=self.pending is None,
            is_home=self.is_home,
        )

    def answer(self) -> None:
        """Complete the pending command."""
        order, self.pending = self.pending, None
        assert order is not None
        for name in order.evict:
            if name not in self.busy:
                self.weights.pop(name, None)
        if order.drain:
            while self.committed - self.used < self.committed - order.num_slabs and self.weights:
                name = next(iter(self.weights))
                self.busy.discard(name)
                del self.weights[name]
        self.committed = max(order.num_slabs, self.used)
        self.admit()

    def drain_own(self, now_s: float) -> None:
        """Evict own models for a request that has waited for long, if that is enough."""
        slabs, since_s = min(self.waiting.values(), key=lambda entry: entry[1], default=(99, now_s))
        if slabs <= self.committed and now_s - since_s >= 3.0:
            self.weights.clear()
            self.busy.clear()

    def admit(self) -> None:
        for name, (slabs, _) in sorted(self.waiting.items(), key=lambda entry: entry[1][1]):
            if slabs > self.committed - self.used:
                return
            del self.waiting[name]
            self.weights[name] = slabs
            self.busy.add(name)


class BrokerMachine(RuleBasedStateMachine):
    """Two engines of one device and one of both. Requests come and end, engines answer in any order, die and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.engines = [FakeEngine(ONE, True), FakeEngine(TWO, True), FakeEngine(BOTH, False)]
        self.now_s = 0.0
        self.names = 0

    def plan(self) -> list[ResizeOrder]:
        shares = [engine.share() for engine in self.engines]
        orders = plan_resizes(CAPACITY, shares, self.now_s)
        assert len({order.engine for order in orders}) == len(orders)
        for order in orders:
            engine, share = self.engines[order.engine], shares[order.engine]
            assert engine.pending is None
            assert order.num_slabs >= 0
            assert set(order.evict) <= {model.model_id for model in share.idle_models}
            if order.num_slabs > share.held:
                engine.given_s = self.now_s
            engine.pending = order
        return orders

    @rule(number=st.integers(0, 2), slabs=st.integers(1, 20))
    def request(self, number: int, slabs: int) -> None:
        self.names += 1
        self.engines[number].waiting[f"m{self.names}"] = slabs, self.now_s
        self.engines[number].admit()

    @rule(number=st.integers(0, 2))
    def end(self, number: int) -> None:
        self.engines[number].busy.clear()

    @rule(number=st.integers(0, 2))
    def die(self, number: int) -> None:
        engine = self.engines[number]
        self.engines[number] = FakeEngine(engine.devices, engine.is_home)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def decide(self) -> None:
        self.plan()

    @precondition(lambda self: any(engine.pending for engine in self.engines))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([engine for engine in self.engines if engine.pending])).answer()

    @invariant()
    def budgets_fit_the_devices(self) -> None:
        for device, capacity in CAPACITY.items():
            held = [engine.share().held for engine in self.engines if device in engine.devices]
            assert sum(held) <= capacity
            assert all(engine.used <= engine.committed for engine in self.engines)

    def teardown(self) -> None:
        """Every request is served in the end, in a bounded number of turns, whether or not the models before it become idle."""
        for _ in range(200):
            if not any(engine.waiting for engine in self.engines):
                return
            self.plan()
            for engine in self.engines:
                if engine.pending is not None:
                    engine.answer()
                engine.drain_own(self.now_s)
                engine.admit()
            self.now_s += 1.5
        raise AssertionError([engine.waiting for engine in self.engines])


TestBroker = BrokerMachine.TestCase
TestBroker.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
