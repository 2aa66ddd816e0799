"""Tracks the models that this pod holds or loads: states, sizes, and running and waiting requests.

All calls come from one event loop. Nothing changes between two awaits, so choosing a victim and marking it is one step.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from common.changes import Changes
from common.clock import epoch_ms
from common.decayed_uses import DecayedUses
from common.model_key import CopySettings
from common.model_state import CopyState
from mesh.placement.eviction import eviction_order
from mesh.placement.request_rate import RequestRate
from mesh.placement.usage import HALF_LIFE_USES, ModelUsage, Usage
from mesh.types import ModelInfo

_PENDING = (CopyState.QUEUED, CopyState.PULLING, CopyState.PACKING, CopyState.LOADING)


@dataclass(eq=False, slots=True)
class LocalCopy:
    """This pod's copy of one model.

    Attributes:
        size_bytes: the booked size. It is 0 until room is reserved, so that a load that only waits takes no room from others.
        expected_bytes: the size of the copy that this one replaces; 0 if unknown.
        prepared_s: when the runtime began to read the weights into memory, on the monotonic clock; 0 before that.
        loaded_s: when the load ended, on the monotonic clock.
        max_concurrency: how many concurrent requests the runtime allows; 0 for no limit.
        is_announced: the model's record lists this pod, so that its removal from the record is an order to unload.
        is_measured: the size of the weights has been written to the model's record.
        base_id: the model whose LoRA adapter this is, which is loaded here too; "" if it is none.
        failure: why the load failed; "" if it did not.
    """

    model_id: str
    info: ModelInfo
    state: CopyState = CopyState.QUEUED
    size_bytes: int = 0
    expected_bytes: int = 0
    started_ms: int = field(default_factory=epoch_ms)
    started_s: float = field(default_factory=time.monotonic)
    prepared_s: float = 0.0
    loaded_s: float = 0.0
    max_concurrency: int = 0
    last_used_ms: int = 0
    is_announced: bool = False
    is_measured: bool = False
    base_id: str = ""
    failure: str = ""

    @property
    def is_pending(self) -> bool:
        return self.state in _PENDING

    @property
    def is_loaded(self) -> bool:
        return self.state is CopyState.LOADED


class LocalCopies:
    """This pod's copies by model id. `settings_of` returns the current copy settings of a model.

    Every change of a copy notifies `changes`. The end of a model's last request notifies `changes` while any copy is being loaded or unloaded.
    """

    def __init__(self, changes: Changes, settings_of: Callable[[str], CopySettings]) -> None:
        self.settings_of = settings_of
        self._copies: dict[str, LocalCopy] = {}
        # Counted by model id and not in the copies, because a request may outlive the copy it started on.
        self._in_flight: Counter[str] = Counter()
        self._carried: Counter[str] = Counter()  # in flight past this process, as Envoy or the workers last reported
        self._waiting: Counter[str] = Counter()
        self._requests = RequestRate(time.monotonic())
        self._changes = changes
        self._listeners: list[Callable[[str], None]] = []
        self._unsettled: set[str] = set()  # models that are being loaded or unloaded
        self.capacity_bytes = 0
        self.uses = DecayedUses(HALF_LIFE_USES)

    def __iter__(self) -> Iterator[LocalCopy]:
        return iter(tuple(self._copies.values()))

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, model_id: str) -> LocalCopy | None:
        return self._copies.get(model_id)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the model's id whenever a copy is added, changes its state or is removed."""
        self._listeners.append(listener)

    def add(self, copy: LocalCopy) -> None:
        self._copies[copy.model_id] = copy
        self._settle(copy)

    def set_state(self, copy: LocalCopy, state: CopyState) -> None:
        copy.state = state
        if self._copies.get(copy.model_id) is copy:
            self._settle(copy)
        else:
            self._changes.notify()

    def remove(self, copy: LocalCopy) -> None:
        """Remove the copy, unless another one has replaced it."""
        if self._copies.get(copy.model_id) is copy:
            del self._copies[copy.model_id]
            self._unsettled.discard(copy.model_id)
        self._notify(copy.model_id)

    @property
    def kept_bytes(self) -> int:
        """The booked bytes of the models that are not being unloaded."""
        return sum(copy.size_bytes for copy in self._copies.values() if copy.state is not CopyState.UNLOADING)

    def usage(self) -> Usage:
        adapters = self._adapters()
        models = tuple(
            ModelUsage(
                copy.model_id,
                copy.size_bytes,
                copy.last_used_ms,
                self._num_users(copy.model_id, adapters),
                is_unloading=copy.state is CopyState.UNLOADING,
                is_loading=copy.is_pending,
                use=self.uses.of(copy.model_id),
                priority=(settings := self.settings_of(copy.model_id)).priority,
                is_pinned=settings.pinned,
            )
            for copy in self._copies.values()
        )
        return Usage(self.capacity_bytes, models)

    def idle(self) -> list[LocalCopy]:
        """Return the loaded copies without requests that may be evicted, in the order of eviction.

        The copy that was loaded last is left out while no load is in progress, because a caller has just asked for it.
        """
        order = {model.model_id: eviction_order(model) for model in self.usage().models}
        loaded = sorted(
            (copy for copy in self._copies.values() if copy.is_loaded and not self.settings_of(copy.model_id).pinned),
            key=lambda copy: (order[copy.model_id], copy.started_ms),
        )
        is_loading = any(copy.is_pending for copy in self._copies.values())
        newest = None if is_loading else max(loaded, key=lambda copy: copy.started_ms, default=None)
        adapters = self._adapters()
        return [copy for copy in loaded if not self._num_users(copy.model_id, adapters) and copy is not newest]

    def touch(self, model_id: str, at_ms: int) -> None:
        """Record a use of the model. An earlier time than the last use changes nothing."""
        copy = self._copies.get(model_id)
        if copy is not None and at_ms > copy.last_used_ms:
            copy.last_used_ms = at_ms
            if copy.base_id:
                self.touch(copy.base_id, at_ms)

    def adapters_of(self, model_id: str) -> list[LocalCopy]:
        """Return the copies of the model's LoRA adapters."""
        return [copy for copy in self._copies.values() if copy.base_id == model_id]

    def in_flight(self, model_id: str) -> int:
        """Return the number of requests that run on this pod's copy, those that Envoy or workers carry included."""
        return self._in_flight.get(model_id, 0) + self._carried.get(model_id, 0)

    def num_waiting(self, model_id: str) -> int:
        """Return the number of requests that wait for the model."""
        return self._waiting[model_id]

    def begin(self, model_id: str) -> None:
        self._requests.add(time.monotonic())
        self._in_flight[model_id] += 1
        self.uses.add(model_id)
        self.touch(model_id, epoch_ms())

    def end(self, model_id: str) -> None:
        self._decrease(self._in_flight, model_id)

    def set_carried(self, model_id: str, num_running: int) -> None:
        """Set the number of requests that Envoy or workers have in flight to this pod's copy."""
        if num_running:
            self._carried[model_id] = num_running
        elif self._carried.pop(model_id, 0):
            self._changes.notify()

    def count_carried(self, model_id: str, num_begun: int, *, is_local: bool) -> None:
        """Count requests that Envoy or workers have carried since the last time, to this pod's copy if `is_local`, else to another pod's."""
        self.uses.add(model_id, num_begun)
        if is_local:
            self._requests.add(time.monotonic(), num_begun)
            self.touch(model_id, epoch_ms())

    def begin_wait(self, model_id: str) -> None:
        self._waiting[model_id] += 1

    def end_wait(self, model_id: str) -> None:
        self._decrease(self._waiting, model_id)

    def requests_per_min(self) -> int:
        return self._requests.per_minute(time.monotonic())

    def _adapters(self) -> dict[str, list[LocalCopy]]:
        """Return the copies of LoRA adapters by the models that they are of."""
        found: dict[str, list[LocalCopy]] = {}
        for copy in self._copies.values():
            if copy.base_id:
                found.setdefault(copy.base_id, []).append(copy)
        return found

    def _num_users(self, model_id: str, adapters: Mapping[str, Sequence[LocalCopy]]) -> int:
        """Return the requests that need the model, those for its adapters and the adapters that are loading included."""
        users = self.in_flight(model_id) + self._waiting.get(model_id, 0)
        for copy in adapters.get(model_id, ()):
            users += copy.is_pending + self._num_users(copy.model_id, adapters)
        return users

    def _decrease(self, counts: Counter[str], model_id: str) -> None:
        counts[model_id] -= 1
        if counts[model_id] <= 0:
            del counts[model_id]
            # Only loads (for room) and unloads (for their copy to drain) wait for requests to end. At a low load, every request is a model's last one.
            if self._unsettled:
                self._changes.notify()

    def _settle(self, copy: LocalCopy) -> None:
        (self._unsettled.discard if copy.is_loaded else self._unsettled.add)(copy.model_id)
        self._notify(copy.model_id)

    def _notify(self, model_id: str) -> None:
        for listener in self._listeners:
            listener(model_id)
        self._changes.notify()
