"""Unloads models from this pod's runtime, after their running requests have finished."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.errors import Unavailable
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.record_updates import RecordUpdates, log_errors
from mesh.types import RuntimeClient

logger = logging.getLogger(__name__)

_RECHECK_S = 1.0
_RETRIES_S = (0.5, 1.0, 2.0, 5.0)
_RETRY_S = 10.0
_ATTEMPTS = 90
_FIRST_IDLE_UNLOAD_S = 0.05  # before any was measured
_NEW_WEIGHT = 0.2  # of the newest measurement in the mean


class LocalUnloads:
    """Runs at most one unload per model. Running requests have `grace_s` to finish, and more if the model is evicted for another one.

    The runtime then unloads at once, without a wait of its own.

    `is_runtime_ready` is False while the runtime's process is away. `withdraw` returns once new requests reach the copy through
    this process only, and all others are counted as in flight.
    """

    def __init__(
        self,
        runtime: RuntimeClient,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        changes: Changes,
        metrics: Metrics,
        *,
        grace_s: float,
        is_runtime_ready: Callable[[], bool],
        withdraw: Callable[[str], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._record_updates = record_updates
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._grace_s = grace_s
        self._is_runtime_ready = is_runtime_ready
        self._withdraw = withdraw
        self.idle_unload_s = _FIRST_IDLE_UNLOAD_S  # mean duration for a model without requests, from the decision on
        self._hurried: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def task(self, model_id: str) -> asyncio.Task[None] | None:
        """Return the model's unload that is in progress, or None."""
        return self._tasks.get(model_id)

    def start(
        self,
        copy: LocalCopy,
        *,
        is_eviction: bool,
        make_room_for: str = "",
        now: bool = False,
        is_needed: Callable[[], bool] | None = None,
    ) -> asyncio.Task[None]:
        """Start to unload the copy, or return its unload that is in progress. The copy gets no new requests from now on.

        `make_room_for`: the model that needs the memory of an evicted copy; empty if the loaded models exceed the capacity.
        `now`: end the running requests instead of waiting for them, also of an unload in progress. `is_needed`: running requests are never cut, and
        the unload is called off when this returns False while they run.
        """
        if now:
            self._hurried.add(copy.model_id)
            self._changes.notify()
        task = self._tasks.get(copy.model_id)
        if task is None:
            for adapter in self._copies.adapters_of(copy.model_id):
                if adapter.is_loaded:  # the runtime unloads adapters with their base
                    self.start(adapter, is_eviction=is_eviction, now=now)
            self._copies.set_state(copy, CopyState.UNLOADING)
            idle_ms = max(0, epoch_ms() - copy.last_used_ms)
            if is_eviction:
                self._metrics.evicted(copy.model_id, idle_ms)
            running = self._copies.in_flight(copy.model_id)
            grace_s = self._grace_s if is_needed is None else None
            cause = f"evicting it for {make_room_for or 'the capacity'}" if is_eviction else "unloading it"
            logger.info(
                "model %s: %s, after its running requests or the grace period",
                copy.model_id,
                cause,
                extra={
                    "bytes": copy.size_bytes,
                    "idle_s": round(idle_ms / 1000, 1) if copy.last_used_ms else None,
                    "running": running,
                    "grace_s": grace_s,
                },
            )
            task = asyncio.create_task(self._unload(copy, is_needed), name=f"unload {copy.model_id}")
            self._tasks[copy.model_id] = task
            task.add_done_callback(lambda _: self._ended(copy.model_id))
        return task

    def _ended(self, model_id: str) -> None:
        self._tasks.pop(model_id, None)
        self._hurried.discard(model_id)

    async def _call_off(self, copy: LocalCopy) -> None:
        """Keep the copy: what it was to make room for is not needed any more."""
        logger.info(
            "model stays loaded: the model that it was to make room for is not needed any more",
            extra={"model": copy.model_id},
        )
        self._copies.set_state(copy, CopyState.LOADED)
        await log_errors(
            self._record_updates.loading(
                copy.model_id, copy.info, started_ms=copy.started_ms, last_used_ms=copy.last_used_ms
            )
        )

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    async def _unload(self, copy: LocalCopy, is_needed: Callable[[], bool] | None) -> None:
        begun_s, was_idle = time.monotonic(), not self._copies.in_flight(copy.model_id)
        await log_errors(
            self._record_updates.gone(
                copy.model_id, last_used_ms=copy.last_used_ms, use=self._copies.uses.of(copy.model_id)
            )
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s if is_needed is None else None):
                await self._withdraw(copy.model_id)
                while self._copies.in_flight(copy.model_id) and copy.model_id not in self._hurried:
                    if is_needed is not None and not is_needed():
                        await self._call_off(copy)
                        return
                    await self._changes.wait(_RECHECK_S)
        started_s = time.monotonic()
        for attempt in range(_ATTEMPTS):
            try:
                await self._runtime.unload(copy.model_id)
                self._metrics.unloaded(time.monotonic() - started_s)
                if was_idle:
                    self.idle_unload_s += _NEW_WEIGHT * (time.monotonic() - begun_s - self.idle_unload_s)
                break
            except Unavailable as error:
                if not self._is_runtime_ready():
                    break  # the process has ended, which freed its memory
                self._metrics.unload_attempt_failed()
                logger.warning("%s (attempt %d)", error.message, attempt + 1)
                await asyncio.sleep(_RETRIES_S[attempt] if attempt < len(_RETRIES_S) else _RETRY_S)
        else:
            self._metrics.unload_failed()
        self._copies.remove(copy)
