"""Makes the room of one load when its runtime is about to read the weights into memory, not while it still fetches the files.

Until then the victims answer requests, and the choice of them takes later requests into account. A load that fails while it fetches files evicts
nothing.
"""

import asyncio
import contextlib
import time

from common.changes import Changes
from mesh.placement.admission import Admission
from mesh.placement.copies import LocalCopy

_UNLOADS = 2.0  # the mean unload is exceeded often, and then the runtime refuses the load
_LEAD_SHARE = 0.1  # of the expected preparation, because the estimate may be too long


def seconds_until_room(expected_s: float, elapsed_s: float, unload_s: float, *, is_prepared: bool) -> float:
    """Return the seconds until an eviction for a load should begin; 0 if it should now.

    `expected_s`: how long the runtime is expected to prepare the files; `is_prepared`: it has done that. `unload_s`: the mean duration of the unload
    of an idle model.
    """
    if is_prepared:
        return 0.0
    return max(0.0, expected_s - max(_UNLOADS * unload_s, _LEAD_SHARE * expected_s) - elapsed_s)


class DeferredRoom:
    """Waits beside the load until the room is needed, and makes it. `expected_s`: as in `seconds_until_room`."""

    def __init__(
        self, admission: Admission, changes: Changes, copy: LocalCopy, size_bytes: int, expected_s: float
    ) -> None:
        self._admission = admission
        self._changes = changes
        self._copy = copy
        self._size_bytes = size_bytes
        self._expected_s = expected_s
        self._is_wanted = False
        self._task = asyncio.create_task(self._run(), name=f"make room for {copy.model_id}")

    @property
    def is_made(self) -> bool:
        return self._task.done() and not self._task.cancelled() and self._task.exception() is None

    async def make_now(self) -> None:
        """Make the room without a further delay. Raises what `Admission.admit` does."""
        self._is_wanted = True
        self._changes.notify()
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop making room: the load has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # The load's own outcome decides.

    async def _run(self) -> None:
        started_s = time.monotonic()
        with contextlib.closing(self._admission.demand_for(self._copy)) as demand:
            while not self._is_wanted:
                demand.is_present()  # notes that requests wait: if all leave, no model in use is evicted
                left_s = seconds_until_room(
                    self._expected_s,
                    time.monotonic() - started_s,
                    self._admission.unload_s,
                    is_prepared=self._copy.prepared_s > started_s,
                )
                if not left_s:
                    break
                await self._changes.wait(left_s)
            await self._admission.admit(self._copy, self._size_bytes, demand, urgent=True, since_s=started_s)
