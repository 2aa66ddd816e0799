"""Divides the slabs of devices among the engines that share them.

Slabs move in two steps: engines give back what nothing uses, and when they have confirmed it, the engine that lacks slabs gets them. A group of several
devices gets slabs on all of its devices or on none. Sizes are in slabs on each device of an engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LEAST_PATIENCE_S = 1.0
_SWAPS_OF_PATIENCE = 3.0  # as inside an engine: a stay lasts at least this many swaps


@dataclass(frozen=True, slots=True)
class IdleModel:
    """A model in device memory that has no requests. `worth`: what keeping it saves; `slabs`: what its eviction frees on each device of its engine."""

    model_id: str
    slabs: int
    worth: float


@dataclass(frozen=True, slots=True)
class EngineShare:
    """The state of one engine.

    Attributes:
        held: slabs that it holds or was allowed to take.
        overhead: slabs of memory that its process takes besides.
        free, cached: held slabs that nothing uses, and those with cached prefixes and idle adapters only.
        spare: free slabs below which it would want more.
        needed: slabs that a request lacks, for which idle models may leave. `wanted`: those that it would use, the needed ones included.
        since_s: when the oldest request came that lacks slabs; inf = only rows that run lack any, for which no busy model is drained.
        swap_s: how long its slabs take to fill.
        given_s: when it last got slabs.
        is_ready: it has completed its last command, and can take another.
        can_get: False for a while after the driver had less than expected. Meanwhile only its own idle models make room for its requests.
        is_home: it holds what no engine of its devices uses.
    """

    devices: tuple[str, ...]
    held: int = 0
    overhead: int = 0
    free: int = 0
    cached: int = 0
    spare: int = 1
    needed: int = 0
    wanted: int = 0
    since_s: float = 0.0
    swap_s: float = 0.0
    given_s: float = float("-inf")
    idle_models: tuple[IdleModel, ...] = ()
    is_ready: bool = True
    can_get: bool = True
    is_home: bool = False


@dataclass(frozen=True, slots=True)
class ResizeOrder:
    """A command for an engine: hold `num_slabs`, evict these idle models, and drain busy ones if that is not enough."""

    engine: int
    num_slabs: int
    evict: tuple[str, ...] = ()
    drain: bool = False


def plan_resizes(capacity: Mapping[str, int], engines: Sequence[EngineShare], now_s: float) -> list[ResizeOrder]:
    """Return the commands to send now, at most one per engine. `capacity`: slabs of each device for all of its engines.

    The request that has waited longest is served first. Until it is, nothing is given to others on its devices. If idle models do not suffice, none is
    evicted; busy models of other engines are drained once the request has waited as long as a stay lasts.
    """
    plan = _Plan(capacity, engines, now_s)
    lacking = [number for number, engine in enumerate(engines) if engine.needed and plan.could_serve(number)]
    for number in sorted(lacking, key=lambda one: (engines[one].since_s, one)):
        if plan.blocked.isdisjoint(engines[number].devices):
            plan.serve(number)
        if engines[number].can_get:
            plan.blocked |= set(engines[number].devices)
    for number, engine in enumerate(engines):
        if engine.wanted > engine.needed and plan.blocked.isdisjoint(engine.devices):
            plan.serve_wish(number)
    for number, engine in enumerate(engines):
        if engine.is_home and plan.blocked.isdisjoint(engine.devices):
            plan.bring_home(number)
    return plan.orders


@dataclass(slots=True)
class _Plan:
    capacity: Mapping[str, int]
    engines: Sequence[EngineShare]
    now_s: float
    orders: list[ResizeOrder] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)

    def could_serve(self, number: int) -> bool:
        """Whether the engine's devices hold what it needs once all else has left. Other requests must not wait for one that never runs."""
        engine = self.engines[number]
        needed = engine.needed + engine.free + engine.cached
        for device in engine.devices:
            overhead = sum(other.overhead for other in self.engines if device in other.devices)
            if needed > self.capacity[device] - overhead:
                return False
        return True

    def serve(self, number: int) -> None:
        """Give an engine the slabs that it needs, or have others give slabs back for it."""
        engine = self.engines[number]
        if not engine.is_ready:
            return
        if not engine.can_get:
            self._send(_Room(self.engines, number, (), dict.fromkeys(engine.devices, engine.needed)).make())
            return
        unallocated = {device: self._unallocated(device) for device in engine.devices}
        if min(unallocated.values()) >= engine.needed:
            self._give(number, min(max(engine.needed, engine.wanted), *unallocated.values()))
            return
        if all(self.engines[other].is_ready for other in self._sharers(number)):
            short = {device: engine.needed - free for device, free in unallocated.items()}
            room = _Room(self.engines, number, self._sharers(number), short)
            orders = room.make() or room.drain(self.now_s)
            self._send(orders)
            if not orders and min(unallocated.values()) > 0 and room.is_overdue(self.now_s):
                # All others have given what they can. With this the engine can make the rest of its room by draining models of its own.
                self._give(number, min(unallocated.values()))

    def serve_wish(self, number: int) -> None:
        """Give an engine slabs that are unallocated, or have others give back free slabs that they hold beyond their own wishes."""
        engine = self.engines[number]
        if not engine.is_ready or not engine.can_get:
            return
        unallocated = min(map(self._unallocated, engine.devices))
        if unallocated > 0:
            self._give(number, min(engine.wanted, unallocated))
            return
        lenders: dict[int, int] = {}
        for device in engine.devices:
            wanted = engine.wanted - self._unallocated(device)
            for other in self._sharers(number):
                lender = self.engines[other]
                if device in lender.devices and wanted > 0:
                    surplus = max(0, lender.free - lender.spare) if lender.is_ready else 0
                    lenders[other] = max(lenders.get(other, 0), min(surplus, wanted))
                    wanted -= lenders[other]
            if wanted > 0:
                return
        self._send([ResizeOrder(other, self.engines[other].held - slabs) for other, slabs in lenders.items() if slabs])
        self.blocked |= set(engine.devices)

    def bring_home(self, number: int) -> None:
        """Give a device's own engine what is unallocated there, if no other engine of the device uses or lacks anything."""
        engine = self.engines[number]
        others = [self.engines[other] for other in self._sharers(number)]
        if (
            engine.is_ready
            and engine.can_get
            and all(not (other.held or other.needed or other.wanted) for other in others)
        ):
            unallocated = min(map(self._unallocated, engine.devices))
            if unallocated > 0:
                self._give(number, unallocated)

    def _give(self, number: int, slabs: int) -> None:
        self._send([ResizeOrder(number, self.engines[number].held + slabs)])

    def _send(self, orders: Sequence[ResizeOrder]) -> None:
        """Add commands. Their engines take no other one before they have answered."""
        self.orders += orders
        for order in orders:
            self.blocked |= set(self.engines[order.engine].devices)

    def _unallocated(self, device: str) -> int:
        engines = (engine for engine in self.engines if device in engine.devices)
        return self.capacity[device] - sum(engine.held + engine.overhead for engine in engines)

    def _sharers(self, number: int) -> list[int]:
        """Return the other engines that have a device in common with this one."""
        devices = set(self.engines[number].devices)
        return [
            other
            for other, engine in enumerate(self.engines)
            if other != number and not devices.isdisjoint(engine.devices)
        ]


@dataclass(slots=True)
class _Room:
    """Finds what leaves for the engine `number`, which lacks `short` slabs on each device."""

    engines: Sequence[EngineShare]
    number: int
    sharers: Sequence[int]
    short: dict[str, int]
    given: dict[int, int] = field(default_factory=dict)
    victims: list[tuple[int, IdleModel]] = field(default_factory=list)

    def make(self) -> list[ResizeOrder]:
        """Return the commands after which the engine has room, nothing if that takes more than what is idle.

        Free slabs go first, then cached prefixes, then idle models of all these engines, the least worth first.
        """
        for kind in ("free", "cached"):
            amounts = {other: int(getattr(self.engines[other], kind)) for other in self.sharers}
            for other in sorted(amounts, key=lambda one: -amounts[one]):
                self._take(other, min(amounts[other], self._short_of(other)))
        candidates = sorted(
            ((other, model) for other in (self.number, *self.sharers) for model in self.engines[other].idle_models),
            key=lambda entry: entry[1].worth,
        )
        for other, model in candidates:
            if self._short_of(other) > 0:
                self._take(other, model.slabs)
                self.victims.append((other, model))
        if self._missing():
            return []
        for other, model in reversed(self.victims.copy()):
            if all(self.short[device] + model.slabs <= 0 for device in self._affected(other)):
                self._take(other, -model.slabs)
                self.victims.remove((other, model))
        return self._orders(drain=False)

    def drain(self, now_s: float) -> list[ResizeOrder]:
        """Return the commands that end the stays of busy models, after `make` found too little; nothing before the patience is over.

        What is still missing then, the engine itself can make by draining models of its own.
        """
        num_drained = 0
        for other in sorted(self.sharers, key=lambda one: self.engines[one].given_s):
            holder = self.engines[other]
            if self.is_overdue(now_s, holder.swap_s) and now_s - holder.given_s >= self._patience_s(holder.swap_s):
                slabs = min(holder.held - self.given.get(other, 0), self._short_of(other))
                self._take(other, slabs)
                num_drained += slabs
        own = self.engines[self.number].held
        return self._orders(drain=True) if num_drained and all(slabs <= own for slabs in self.short.values()) else []

    def is_overdue(self, now_s: float, holder_swap_s: float = 0.0) -> bool:
        """Whether the engine's oldest request has waited as long as a stay lasts."""
        return now_s - self.engines[self.number].since_s >= self._patience_s(holder_swap_s)

    def _patience_s(self, holder_swap_s: float) -> float:
        return max(_LEAST_PATIENCE_S, _SWAPS_OF_PATIENCE * (self.engines[self.number].swap_s + holder_swap_s))

    def _orders(self, *, drain: bool) -> list[ResizeOrder]:
        orders = []
        for other in (self.number, *self.sharers):
            evict = tuple(model.model_id for owner, model in self.victims if owner == other)
            # Evicting its own models gives an engine room without another budget.
            slabs = 0 if other == self.number else min(self.given.get(other, 0), self.engines[other].held)
            if evict or slabs:
                orders.append(ResizeOrder(other, self.engines[other].held - slabs, evict, drain and slabs > 0))
        return orders

    def _affected(self, other: int) -> list[str]:
        return [device for device in self.engines[other].devices if device in self.short]

    def _short_of(self, other: int) -> int:
        return max((self.short[device] for device in self._affected(other)), default=0)

    def _missing(self) -> bool:
        return any(slabs > 0 for slabs in self.short.values())

    def _take(self, other: int, slabs: int) -> None:
        if slabs:
            self.given[other] = self.given.get(other, 0) + slabs
            for device in self._affected(other):
                self.short[device] -= slabs
