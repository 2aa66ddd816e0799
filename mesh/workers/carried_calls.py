"""Chooses where a worker sends each call, this pod's copy of the model or the control process, and counts the calls to copies."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.envoy.plan import Carrier, name_prefix
from mesh.routing.attempts import Attempt, Attempts, RoutingRequest
from mesh.routing.copy_health import CopyHealth
from mesh.routing.in_flight import InFlight
from mesh.types import Target
from mesh.workers.messages import CarriedCopy, CopyCalls, EndedCalls, Figures, Table

_RECENT_CALLS = 31


@dataclass(slots=True)
class _Count:
    begun: int = 0
    active: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_CALLS))


class CarriedCalls:
    """The worker's table and figures. `local` and `control`: the targets that stand for the pod's runtime and its control process.

    `is_mute`: whether the runtime answers no requests, as far as this worker's calls show.
    """

    def __init__(self, local: Target, control: Target, in_flight: InFlight, is_mute: Callable[[], bool]) -> None:
        self.local = local
        self.control = control
        self._in_flight = in_flight
        self._is_mute = is_mute
        self._health = CopyHealth()
        self._table: dict[str, CarriedCopy] = {}  # by the cluster's name
        self._counts: dict[str, _Count] = {}  # by stat_name
        self._keys: Counter[tuple[str, Carrier, str]] = Counter()

    def apply(self, change: Table) -> None:
        for name in change.removed:
            if (copy := self._table.pop(name, None)) is not None:
                self._health.forget(copy.model_id)
        self._table.update(change.changed)

    def carries(self, carrier: Carrier, name: str) -> bool:
        """Return whether calls for a name may go to this pod's copy."""
        return self._key(carrier, name) in self._table

    def attempts(self, carrier: Carrier, name: str) -> Attempts:
        """Return the attempts of a call: one at the copy if the name has one that answers, then those at control. An empty name stands for none."""
        copy = self._table.get(self._key(carrier, name)) if name else None
        if copy is not None and (self._is_mute() or self._is_ejected(copy)):
            copy = None
        return Attempts(_Targets(self, copy), RoutingRequest(name, copy.model_id if copy is not None else ""))

    def count_key(self, key: str, carrier: Carrier, code: str) -> None:
        """Count the end of a call of a key, which control does not see."""
        self._keys[key, carrier, code] += 1

    def figures(self, number: int) -> Figures:
        """Return the figures, of which begun and ended calls count from 0 again."""
        copies = {}
        listed = {copy.stat_name for copy in self._table.values()}
        for stat_name, count in tuple(self._counts.items()):
            latency_s = statistics.median(count.seconds) if count.seconds else 0.0
            copies[stat_name] = CopyCalls(count.begun, count.active, latency_s)
            count.begun = 0
            if not count.active and stat_name not in listed:
                del self._counts[stat_name]
        keys = tuple(EndedCalls(*call, count) for call, count in self._keys.items())
        self._keys.clear()
        return Figures(number, copies, keys)

    def begin(self, copy: CarriedCopy, attempt: Attempt) -> None:
        """Count an attempt at a copy, in the same step in which the copy was found in the table."""
        count = self._counts.setdefault(copy.stat_name, _Count())
        count.begun += 1
        count.active += 1
        self._health.chosen(copy.model_id, self.local.instance_id)
        self._in_flight.add(attempt)

    def end(self, copy: CarriedCopy, attempt: Attempt) -> None:
        count = self._counts[copy.stat_name]
        count.active -= 1
        count.seconds.append(time.monotonic() - attempt.started_s)
        self._in_flight.remove(attempt)
        self._health.record(attempt)

    def _is_ejected(self, copy: CarriedCopy) -> bool:
        return self._health.is_ejected(copy.model_id, self.local.instance_id, time.monotonic())

    @staticmethod
    def _key(carrier: Carrier, name: str) -> str:
        return f"{name_prefix(carrier, from_peers=False)}/{name}"


class _Targets:
    """Implements mesh.routing.attempts.Routes for one call. `copy`: the copy that it goes to first, if there is one."""

    __slots__ = ("_calls", "_copy", "_has_tried")

    def __init__(self, calls: CarriedCalls, copy: CarriedCopy | None) -> None:
        self._calls = calls
        self._copy = copy
        self._has_tried = copy is None

    async def route(
        self, model_id: str, *, deadline_s: float | None, prefix_hash: str, exclude: frozenset[str], local_only: bool
    ) -> Target:
        return self._calls.control if self._has_tried else self._calls.local

    def begin(self, attempt: Attempt) -> None:
        self._has_tried = True
        if self._copy is not None and attempt.target.local:
            self._calls.begin(self._copy, attempt)

    def end(self, attempt: Attempt) -> None:
        if self._copy is not None and attempt.target.local:
            self._calls.end(self._copy, attempt)

    def mark_lost(self, model_id: str, target: Target) -> None:
        """Do nothing: control gets the call next, and finds out by itself."""

    async def successor(self, name: str, model_id: str) -> str | None:
        return None
