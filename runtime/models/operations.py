"""Places in a model's queue: one operation each, which starts when the one before has settled. Knows tasks; nothing of what they do."""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto


class OperationKind(Enum):
    LOAD = auto()
    RETURN = auto()
    UNLOAD = auto()


@dataclass(eq=False, slots=True)
class Operation:
    """One operation on one id, in its queue. `waiters` counts callers of a load; the last to leave takes it along."""

    kind: OperationKind
    mark: bytes
    task: "asyncio.Task[None]"
    waiters: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Once only: a second cancellation would cut short the undoing."""
        if not self.cancelled:
            self.cancelled = True
            self.task.cancel()


async def settled(task: "asyncio.Task[None]") -> None:
    """Wait for an earlier operation. Who is cancelled while it waits still keeps its place, or the next one would run beside the one before."""
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
