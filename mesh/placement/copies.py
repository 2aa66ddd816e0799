"""The models that this pod holds or is about to: their states, sizes and users. Bookkeeping only; calls nobody.

All on one event loop: between two awaits nothing changes, which is what makes choosing a victim and marking it one step.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.placement.usage import ModelUsage, Usage
from mesh.types import ModelInfo

_PENDING = (CopyState.QUEUED, CopyState.PULLING, CopyState.PACKING, CopyState.LOADING)


@dataclass(eq=False, slots=True)
class LocalCopy:
    """`is_announced`: the registry's record has it, so that its absence there later means "unload". `size_bytes` counts from the moment
    that room is reserved: a load that only waits must not keep others from theirs. `expected_bytes`: what it was before; 0 = not known."""

    model_id: str
    info: ModelInfo
    state: CopyState = CopyState.QUEUED
    size_bytes: int = 0
    expected_bytes: int = 0
    started_ms: int = field(default_factory=epoch_ms)
    started_s: float = field(default_factory=time.monotonic)
    loaded_s: float = 0.0
    max_concurrency: int = 0  # requests at once that its runtime asks for; 0 = as many as come
    last_used_ms: int = 0
    is_announced: bool = False
    is_measured: bool = False  # the registry was told what its weights take

    @property
    def is_pending(self) -> bool:
        return self.state in _PENDING

    @property
    def is_loaded(self) -> bool:
        return self.state is CopyState.LOADED


class LocalCopies:
    def __init__(self, changes: Changes) -> None:
        self._copies: dict[str, LocalCopy] = {}
        # by id, not in the copies: a request may outlive the copy it began on
        self._in_flight: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._changes = changes
        self.capacity_bytes = 0

    def __iter__(self) -> Iterator[LocalCopy]:
        return iter(tuple(self._copies.values()))

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, model_id: str) -> LocalCopy | None:
        return self._copies.get(model_id)

    def add(self, copy: LocalCopy) -> None:
        self._copies[copy.model_id] = copy
        self._changes.notify()

    def set_state(self, copy: LocalCopy, state: CopyState) -> None:
        copy.state = state
        self._changes.notify()

    def remove(self, copy: LocalCopy) -> None:
        if self._copies.get(copy.model_id) is copy:
            del self._copies[copy.model_id]
        self._changes.notify()

    def usage(self) -> Usage:
        models = tuple(
            ModelUsage(
                copy.model_id,
                copy.size_bytes,
                copy.last_used_ms,
                self._in_flight[copy.model_id] + self._waiting[copy.model_id],
                is_unloading=copy.state is CopyState.UNLOADING,
                is_loading=copy.is_pending,
            )
            for copy in self._copies.values()
        )
        return Usage(self.capacity_bytes, models)

    def touch(self, model_id: str, at_ms: int) -> None:
        copy = self._copies.get(model_id)
        if copy is not None and at_ms > copy.last_used_ms:
            copy.last_used_ms = at_ms

    def in_flight(self, model_id: str) -> int:
        return self._in_flight[model_id]

    def num_waiting(self, model_id: str) -> int:
        """Requests that wait for the model to be loaded."""
        return self._waiting[model_id]

    def begin(self, model_id: str) -> None:
        self._in_flight[model_id] += 1
        self.touch(model_id, epoch_ms())

    def end(self, model_id: str) -> None:
        self._decrease(self._in_flight, model_id)

    def begin_wait(self, model_id: str) -> None:
        self._waiting[model_id] += 1

    def end_wait(self, model_id: str) -> None:
        self._decrease(self._waiting, model_id)

    def _decrease(self, counts: Counter[str], model_id: str) -> None:
        counts[model_id] -= 1
        if counts[model_id] <= 0:
            del counts[model_id]
            # whoever waits for room, or for the copy to drain
            self._changes.notify()
