"""One model's waiting sequences: higher priority first, then earlier arrival. Removal from the middle is cheap."""

import heapq

from runtime.engine.scheduler.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        self._members.add(sequence)
        heapq.heappush(self._heap, (sequence.order, sequence))

    def head(self) -> Sequence | None:
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def discard(self, sequence: Sequence) -> None:
        self._members.discard(sequence)
        if not self._members:
            self._heap.clear()

    def members(self) -> list[Sequence]:
        return sorted(self._members, key=lambda sequence: sequence.order)

    def oldest_s(self) -> float | None:
        """Return the earliest arrival, in seconds of the engine's clock."""
        return min((sequence.arrived_s for sequence in self._members), default=None)
