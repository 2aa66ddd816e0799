"""The queue of operations on one model: each starts when the previous one has settled."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
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


class OperationQueue:
    """Runs the operations on one id in the order of their arrival, and those on different ids concurrently. `notify` is called after each one."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._tails: dict[str, Operation] = {}

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids that have an operation."""
        return iter(self._tails)

    def last(self, model_id: str) -> Operation | None:
        """Return the operation on this id that came last, None if all have ended."""
        return self._tails.get(model_id)

    def add(
        self, model_id: str, kind: OperationKind, mark: bytes, work: Callable[[], Coroutine[object, object, None]]
    ) -> Operation:
        """Run `work` after the operations on this id that were added before."""
        before = self._tails.get(model_id)

        async def run() -> None:
            try:
                if before is not None:
                    await settled(before.task)
                await work()
            finally:
                if self._tails.get(model_id) is operation:
                    del self._tails[model_id]
                self._notify()

        operation = Operation(kind, mark, asyncio.create_task(run(), name=f"{kind.name.lower()} {model_id}"))
        # Callers have the result. A task without callers (a reload after a crash) has logged it.
        operation.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._tails[model_id] = operation
        return operation

    async def join(self, operation: Operation) -> bool:
        """Wait for an operation and raise its error. Returns False if it was cancelled. A load is cancelled when its last caller is."""
        operation.waiters += 1
        try:
            await asyncio.shield(operation.task)
        except asyncio.CancelledError:
            if operation.task.cancelled():
                return False
            if operation.waiters == 1 and operation.kind is OperationKind.LOAD:
                operation.cancel()
            raise
        finally:
            operation.waiters -= 1
        return True

    async def cancel_all(self) -> None:
        """Cancel the operations that came last, and wait until they have ended."""
        operations = [*self._tails.values()]
        for operation in operations:
            operation.cancel()
        await asyncio.gather(*(operation.task for operation in operations), return_exceptions=True)


async def settled(task: "asyncio.Task[None]") -> None:
    """Wait for an earlier operation, even if cancelled meanwhile: otherwise the next operation would run beside the earlier one."""
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
