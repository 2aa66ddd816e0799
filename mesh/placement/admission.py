"""Admits models to this pod's capacity: evicts others until the model's size fits, and books that size."""

import logging
import time
from collections.abc import Callable

from common.changes import Changes
from mesh.errors import LoadFailed, Overloaded
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.demand import Demand
from mesh.placement.eviction import plan_eviction
from mesh.placement.load_times import retry_after_s
from mesh.placement.unloads import LocalUnloads

logger = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 180.0  # as in ModelMesh: a load without room by then ends, and does not count as the model's failure
_SPARE_BUSY_S = 5.0  # how long a load waits for idle victims before it evicts models in use, which drain first


class DeclinedError(Exception):
    """The model was not loaded, because everything that it would displace was used more recently."""


class Admission:
    """`busy_s` returns when the running requests of a model are expected to end; 0 if that is unknown."""

    def __init__(
        self, copies: LocalCopies, changes: Changes, unloads: LocalUnloads, busy_s: Callable[[str], float]
    ) -> None:
        self._copies = copies
        self._changes = changes
        self._unloads = unloads
        self._busy_s = busy_s

    @property
    def unload_s(self) -> float:
        """The mean duration of the unload of an idle model."""
        return self._unloads.idle_unload_s

    def must_evict(self, copy: LocalCopy, size_bytes: int) -> bool:
        """Return whether the model fits only if others are evicted. Raises LoadFailed if it exceeds the capacity."""
        eviction = plan_eviction(self._copies.usage(), copy.model_id, size_bytes)
        if eviction.never_fits:
            raise self._too_large(copy, size_bytes)
        return eviction.wait

    def demand_for(self, copy: LocalCopy) -> Demand:
        """Return whether the copy's load needs room. The caller closes it when the room is made or not needed any more."""
        return Demand(lambda: self._copies.num_waiting(copy.model_id))

    async def admit(
        self, copy: LocalCopy, size_bytes: int, demand: Demand, *, urgent: bool = True, since_s: float
    ) -> None:
        """Wait until `size_bytes` fit, evicting others, and book them.

        `urgent` False: only models last used before this one are evicted. `since_s`: when the wait for the model began. Raises LoadFailed if the
        size exceeds the capacity, DeclinedError, and Overloaded if there is no room in time.
        """
        await self._make_room(copy, size_bytes, urgent, demand, since_s + _SPARE_BUSY_S)
        copy.size_bytes = size_bytes

    def wait_s(self) -> float | None:
        """Return when the first model in use is expected to be idle, so that it can be unloaded; None if that is unknown."""
        estimates = (self._busy_s(model.model_id) for model in self._copies.usage().models if model.num_users)
        return min((seconds for seconds in estimates if seconds), default=None)

    async def _make_room(
        self, copy: LocalCopy, size_bytes: int, urgent: bool, demand: Demand, spare_busy_until_s: float
    ) -> None:
        now_s = time.monotonic()
        give_up_s = now_s + ROOM_TIMEOUT_S
        while True:
            eviction = plan_eviction(
                self._copies.usage(),
                copy.model_id,
                size_bytes,
                last_used_ms=None if urgent or self._copies.num_waiting(copy.model_id) else copy.last_used_ms,
                spare_busy=now_s < spare_busy_until_s or not demand.is_present(),
            )
            if eviction.never_fits:
                raise self._too_large(copy, size_bytes)
            if eviction.declined:
                logger.info("model %s is not loaded: all that it would displace was used more recently", copy.model_id)
                raise DeclinedError
            if not eviction.wait:
                return
            if now_s > give_up_s:
                raise self._no_room(copy, size_bytes)
            for victim_id in eviction.victims:
                victim = self._copies.get(victim_id)
                if victim is not None and victim.is_loaded:
                    self._unloads.start(
                        victim, is_eviction=True, make_room_for=copy.model_id, is_needed=demand.is_present
                    )
            next_s = spare_busy_until_s if now_s < spare_busy_until_s else give_up_s
            await self._changes.wait(max(0.05, next_s - now_s))
            now_s = time.monotonic()

    def _too_large(self, copy: LocalCopy, size_bytes: int) -> LoadFailed:
        capacity_bytes = self._copies.capacity_bytes
        return LoadFailed(
            f"it needs {size_bytes} bytes; the capacity is {capacity_bytes} bytes",
            model=copy.model_id,
            limit=capacity_bytes,
            value=size_bytes,
            lasting=True,
        )

    def _no_room(self, copy: LocalCopy, size_bytes: int) -> Overloaded:
        return Overloaded(
            f"no room for its {size_bytes} bytes within {ROOM_TIMEOUT_S:.0f} s",
            model=copy.model_id,
            limit=self._copies.capacity_bytes,
            value=size_bytes,
            retry_after_s=None if (wait_s := self.wait_s()) is None else retry_after_s(wait_s),
        )
