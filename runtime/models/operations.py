"""The queue of operations on one model: each starts when the previous one has settled."""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto


class OperationKind(Enum):
    LOAD = auto()
    RETURN = auto()
    UNLOAD = auto()


@dataclass(eq=False, slots=True)
class Operation:
    """One operation on one model id. `waiters` counts the callers of a load; the load is cancelled when the last one leaves."""

    kind: OperationKind
    mark: bytes
    task: "asyncio.Task[None]"
    waiters: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Cancel the task once. A second cancellation would interrupt its cleanup."""
        if not self.cancelled:
            self.cancelled = True
            self.task.cancel()


async def settled(task: "asyncio.Task[None]") -> None:
    """Wait for an earlier operation, even if cancelled meanwhile: otherwise the next operation would run beside the earlier one."""
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
