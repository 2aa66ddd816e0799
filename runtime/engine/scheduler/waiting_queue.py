"""Orders one model's waiting sequences: higher priority first, then earlier arrival. Removal from the middle is cheap.

Sequences whose adapter is not ready are set aside, so that they do not hold back those behind them.
"""

import heapq
from itertools import count

from runtime.engine.scheduler.adapter_use import AdapterUse
from runtime.engine.scheduler.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int, Sequence]] = []  # with stale entries
        self._pushes = (
            count()
        )  # a sequence that comes back may find its stale entry, and sequences have no order of their own
        self._members: set[Sequence] = set()  # those that may be admitted
        self._blocked: dict[AdapterUse, dict[Sequence, None]] = {}

    def __len__(self) -> int:
        return len(self._members) + sum(map(len, self._blocked.values()))

    def push(self, sequence: Sequence) -> None:
        adapter = sequence.adapter
        if adapter is not None and not adapter.ready:
            self._blocked.setdefault(adapter, {})[sequence] = None
            return
        self._members.add(sequence)
        heapq.heappush(self._heap, (sequence.order, next(self._pushes), sequence))

    def head(self) -> Sequence | None:
        """Return the first sequence that may be admitted."""
        while self._heap and self._heap[0][2] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def discard(self, sequence: Sequence) -> None:
        if sequence.adapter is not None and sequence in (blocked := self._blocked.get(sequence.adapter, {})):
            del blocked[sequence]
            if not blocked:
                del self._blocked[sequence.adapter]
        self._members.discard(sequence)
        if not self._members:
            self._heap.clear()

    def members(self) -> list[Sequence]:
        return sorted(self._all(), key=lambda sequence: sequence.order)

    def oldest_s(self) -> float | None:
        """Return the earliest arrival, in seconds of the engine's clock."""
        return min((sequence.arrived_s for sequence in self._all()), default=None)

    def blocked(self) -> list[tuple[Sequence, AdapterUse]]:
        """Return the first blocked sequence of each adapter that is not ready, in order."""
        firsts = [(min(waiting, key=lambda s: s.order), adapter) for adapter, waiting in self._blocked.items()]
        return sorted(firsts, key=lambda entry: entry[0].order)

    def unblock(self, adapter: AdapterUse) -> None:
        """Let the sequences of an adapter be admitted: it is ready."""
        for sequence in self._blocked.pop(adapter, {}):
            self.push(sequence)

    def block(self, adapter: AdapterUse) -> None:
        """Set the sequences of an adapter aside: it is not ready any more."""
        for sequence in [member for member in self._members if member.adapter is adapter]:
            self._members.discard(sequence)
            self.push(sequence)
        if not self._members:
            self._heap.clear()

    def _all(self) -> list[Sequence]:
        return [*self._members, *(sequence for waiting in self._blocked.values() for sequence in waiting)]
