"""Loads models on this pod's runtime: one load per model at a time, after room is made for it.

A load continues when its last waiter is cancelled; only `unload` and `close` cancel it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence, Set

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState, ModelState
from mesh.errors import LoadFailed, NotFound, Overloaded, StoreError, Unavailable
from mesh.observability.metrics import Metrics
from mesh.placement.admission import ROOM_TIMEOUT_S, Admission, DeclinedError
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.deferred_room import DeferredRoom
from mesh.placement.failures import lost_base_text
from mesh.placement.load_times import LoadTimes
from mesh.placement.record_updates import LoadedElsewhere, RecordUpdates, log_errors
from mesh.placement.unloads import LocalUnloads
from mesh.registry.registration import base_of, over_base
from mesh.types import LoadAnswer, ModelInfo, RuntimeClient, RuntimeLimits

logger = logging.getLogger(__name__)

_RUNTIME_RETRY_S = 60.0  # how long a runtime that answers UNAVAILABLE may take to return
_RETRY_PAUSE_S = 0.2
_RECHECK_ROOM_S = 1.0


class LocalLoads:
    """Loads models and evicts others for them. The first load waits for `runtime_ready`."""

    def __init__(
        self,
        runtime: RuntimeClient,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        changes: Changes,
        metrics: Metrics,
        *,
        load_timeout_s: float,
        grace_s: float,
        publish: Callable[[], Awaitable[None]],
        base_of: Callable[[ModelInfo], Awaitable[tuple[str, ModelInfo] | None]],
        busy_s: Callable[[str], float],
        others: Callable[[], Set[str]],
        reported: Callable[[], Sequence[ModelState]],
        reports_states: Callable[[], bool],
        withdraw: Callable[[str], Awaitable[None]],
    ) -> None:
        """`load_timeout_s`: 0 takes the runtime's own timeout. `grace_s`: what running requests have to finish before an unload. `publish` writes this pod's record, in which other pods see a load end.

        `base_of` returns the id and the key of the model whose LoRA adapter a key describes, None for other models.
        `busy_s` returns when the running requests of a model are expected to end; 0 if that is unknown. `others` returns the other pods that
        serve, `reported` the models that the runtime reports. `reports_states` is False for a runtime that does not report the states of its models.
        `withdraw`: as in LocalUnloads.
        """
        self._publish = publish
        self._base_of = base_of
        self._others = others
        self._reported = reported
        self._reports_states = reports_states
        self._runtime = runtime
        self._record_updates = record_updates
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._load_timeout_s = load_timeout_s
        self._default_size_bytes = 0
        self._slots: asyncio.Semaphore | None = None
        self._ready = asyncio.Event()
        self._unloads = LocalUnloads(
            runtime,
            record_updates,
            copies,
            changes,
            metrics,
            grace_s=grace_s,
            is_runtime_ready=self._ready.is_set,
            withdraw=withdraw,
        )
        self._admission = Admission(copies, changes, self._unloads, busy_s)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deferred: set[str] = set()  # models whose loads began before there was room
        self._num_early = 0  # loads that ended before their room was made, in room that may have been made for others
        # Measured sizes by model id: a model that is loaded again needs no prediction.
        self._sizes_bytes: dict[str, int] = {}
        self.times = LoadTimes()
        self._preparation_times = LoadTimes()  # until the weights are read into memory
        self.num_failed_in_a_row = 0  # of any models: this pod may be the cause

    def runtime_ready(self, limits: RuntimeLimits) -> None:
        """Start the loads that wait: the runtime is ready and holds no models."""
        self._copies.capacity_bytes = limits.capacity_bytes
        self._default_size_bytes = limits.default_model_size_bytes
        self._load_timeout_s = self._load_timeout_s or limits.model_loading_timeout_s
        if self._slots is None:
            self._slots = asyncio.Semaphore(limits.max_loading_concurrency)
        self._ready.set()
        self._changes.notify()

    def runtime_lost(self) -> None:
        """Let loads wait until the runtime is ready again."""
        self._ready.clear()

    @property
    def num_loading(self) -> int:
        return len(self._tasks)

    def load(
        self, model_id: str, info: ModelInfo, *, last_used_ms: int, urgent: bool = True, is_extra: bool = False
    ) -> asyncio.Task[None]:
        """Return the model's load that is in progress, or start one. Wait for it with `asyncio.wait`, because `unload` cancels it.

        `urgent` False: the load displaces only models that were last used before `last_used_ms`. `is_extra`: load although another pod has the
        model. Otherwise the task ends without a copy if one does.
        A failure that is the model's own ends the task normally and is recorded. The task raises Overloaded if no room
        could be made, and Unavailable if the runtime did not return.
        """
        task = self._tasks.get(model_id)
        if task is not None:
            self._copies.touch(model_id, last_used_ms)
            return task
        copy = LocalCopy(model_id, info, last_used_ms=last_used_ms)
        previous = self._copies.get(model_id)
        if previous is not None and previous.state is not CopyState.UNLOADING:
            copy.expected_bytes = previous.size_bytes or previous.expected_bytes
            copy.is_announced = previous.is_announced
        task = asyncio.create_task(self._load(copy, urgent, is_extra), name=f"load {model_id}")
        self._tasks[model_id] = task
        task.add_done_callback(lambda done: self._ended(model_id, done))
        if previous is None or previous.state is not CopyState.UNLOADING:
            self._copies.add(copy)
        return task

    def task(self, model_id: str) -> asyncio.Task[None] | None:
        """Return the model's load that is in progress, or None."""
        return self._tasks.get(model_id)

    def forget(self, model_id: str) -> None:
        """Drop what was measured of a model that is no longer registered."""
        self.times = self.times.without(model_id)
        self._preparation_times = self._preparation_times.without(model_id)
        self._sizes_bytes.pop(model_id, None)

    async def unload(self, model_id: str, *, now: bool = False) -> None:
        """Cancel the model's load and unload its copy. Return when the copy is gone. Does nothing for a model without a copy.

        `now`: end its running requests instead of waiting for them.
        """
        task = self._tasks.get(model_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        copy = self._copies.get(model_id)
        if copy is not None:
            await asyncio.shield(self._unloads.start(copy, is_eviction=False, now=now))

    def trim(self) -> None:
        """Evict idle models until the loaded ones fit the capacity, as after a prediction that was too low.

        Models in use stay; the next call evicts them if they are idle by then.
        """
        while self._copies.kept_bytes > self._copies.capacity_bytes:
            victim = next(iter(self._copies.idle()), None)
            if victim is None:
                return
            self._unloads.start(victim, is_eviction=True)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        await self._unloads.close()

    def _ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(model_id, None)
        if not task.cancelled() and task.exception() is not None:
            logger.info("load of %s ended: %s", model_id, task.exception())
        self._changes.notify()

    async def _load(self, copy: LocalCopy, urgent: bool, is_extra: bool) -> None:
        model_id = copy.model_id
        unloading = self._unloads.task(model_id)
        if unloading is not None:
            await asyncio.wait([unloading])
        self._copies.add(copy)
        is_kept = False
        queued_s = time.monotonic()
        try:
            await self._announce(copy, is_extra)
            await self._ready.wait()
            assert self._slots is not None
            await self._load_base(copy)  # before a slot is taken, which the base may need
            async with self._slots:
                self._metrics.load_started(time.monotonic() - queued_s)
                await self._load_with_room(copy, urgent)
            is_kept = True
            self.num_failed_in_a_row = 0
            copy.loaded_s = time.monotonic()
            self._copies.set_state(copy, CopyState.LOADED)
            # Callers are answered after this, so every pod that reads the record says LOADED by then.
            await self._publish()
            await log_errors(self._record_updates.loaded(model_id))
        except LoadFailed as error:
            await self._record_failure(copy, error)
        except DeclinedError:
            pass
        except LoadedElsewhere as error:
            logger.info("model %s is not loaded here: %s", model_id, error.detail)
        finally:
            if not is_kept:
                self._copies.remove(copy)
                await log_errors(self._record_updates.gone(model_id))
        self.trim()

    async def _load_base(self, copy: LocalCopy) -> None:
        """Have the base of an adapter loaded on this pod. Raises LoadFailed if that is impossible."""
        try:
            base = await self._base_of(copy.info)
        except NotFound:
            raise LoadFailed(lost_base_text(base_of(copy.info)), model=copy.model_id) from None
        if base is None:
            return
        copy.base_id, info = base
        self._copies.touch(copy.base_id, copy.last_used_ms)
        loaded = tried = self._copies.get(copy.base_id)
        if loaded is None or not loaded.is_loaded:
            task = self.load(copy.base_id, info, last_used_ms=copy.last_used_ms, is_extra=True)
            tried = self._copies.get(copy.base_id)
            await asyncio.wait([task])
            loaded = self._copies.get(copy.base_id)
        if loaded is None or not loaded.is_loaded:
            cause = f": {tried.failure}" if tried is not None and tried.failure else ""
            raise LoadFailed(f"its base {copy.base_id} could not be loaded on this pod{cause}", model=copy.model_id)

    async def _announce(self, copy: LocalCopy, is_extra: bool) -> None:
        try:
            await self._record_updates.loading(
                copy.model_id,
                copy.info,
                started_ms=copy.started_ms,
                last_used_ms=copy.last_used_ms,
                alone_among=frozenset() if is_extra else self._others(),
            )
            copy.is_announced = True
        except StoreError as error:
            # A store outage must not keep a known model from being served. The next sweep announces the copy.
            logger.warning("model %s is loaded unannounced: %s", copy.model_id, error.message)

    async def _load_with_room(self, copy: LocalCopy, urgent: bool) -> None:
        """Load the model and make room for it: before the load if it need not evict, else when the runtime has the files."""
        size_bytes = await self._expected_size_bytes(copy)
        started_s = time.monotonic()
        room = None
        if urgent and self._reports_states() and self._admission.must_evict(copy, size_bytes):
            expected_s = self._preparation_times.expected_s(copy.model_id, size_bytes)
            room = DeferredRoom(self._admission, self._changes, copy, size_bytes, expected_s)
            self._deferred.add(copy.model_id)
        else:
            with contextlib.closing(self._admission.demand_for(copy)) as demand:
                await self._admission.admit(copy, size_bytes, demand, urgent=urgent, since_s=started_s)
        try:
            await self._load_measured(copy, room)
        finally:
            if room is not None:
                self._deferred.discard(copy.model_id)
                await room.close()

    async def _load_measured(self, copy: LocalCopy, room: DeferredRoom | None) -> None:
        self._copies.set_state(copy, CopyState.LOADING)
        started_s = time.monotonic()
        answer = await self._load_on_runtime(copy, room)
        elapsed_s = time.monotonic() - started_s
        if room is not None and not room.is_made:
            self._num_early += 1
            await self._make_up_room(copy, room)
        copy.size_bytes, copy.max_concurrency = answer.size_bytes or copy.size_bytes, answer.max_concurrency
        self._sizes_bytes[copy.model_id] = copy.size_bytes
        self.times = self.times.measured(copy.model_id, copy.size_bytes, elapsed_s)
        self._metrics.loaded(copy.model_id, elapsed_s, copy.size_bytes, answer.sizing_s)
        # The runtime's own line says that the model is loaded.
        logger.debug("model %s is booked with %d bytes", copy.model_id, copy.size_bytes)

    async def _make_up_room(self, copy: LocalCopy, room: DeferredRoom) -> None:
        """Make the room of a load that the runtime ended without it: it may hold more than its capacity for a moment only."""
        try:
            await room.make_now()
        except BaseException:
            # The load was not refused, so nothing else would unload the model.
            await self._runtime.undo_load(copy.model_id)
            raise

    async def _load_on_runtime(self, copy: LocalCopy, room: DeferredRoom | None) -> LoadAnswer:
        """Load, and wait for a runtime that restarts. Make room while the runtime has no space, although the books say it has.

        A runtime that needs the deferred `room` before that has been made keeps the files, so that its second load is short.
        Models that the runtime holds and this pod does not know are unloaded first, then idle ones are evicted. If all are in use, wait for one.
        Raises LoadFailed if the runtime has no space after as many bytes were evicted as the model is booked with, and as much again for each load
        that took space before its own was made: then it lacks something that evictions do not free.
        """
        give_up_s = time.monotonic() + _RUNTIME_RETRY_S
        give_up_room_s = time.monotonic() + ROOM_TIMEOUT_S
        evicted_bytes = 0
        num_early, has_paused = self._num_early, False
        while True:
            await self._ready.wait()
            had_room = room is None or room.is_made
            try:
                info = over_base(copy.info, copy.base_id) if copy.base_id else copy.info
                return await self._load_once(copy, info)
            except Unavailable as error:
                if time.monotonic() > give_up_s:
                    raise
                logger.info("%s; trying again", error.message)
                await asyncio.sleep(_RETRY_PAUSE_S)
            except Overloaded as error:
                if room is not None and not had_room:
                    self._copies.set_state(copy, CopyState.QUEUED)
                    await room.make_now()
                    self._copies.set_state(copy, CopyState.LOADING)
                    continue
                if await self._unload_unknown():
                    continue
                others = self._deferred - {copy.model_id}
                victim = next(iter(self._copies.idle()), None)
                if victim is None and (others or self._has_busy_copy(copy)) and time.monotonic() < give_up_room_s:
                    await self._changes.wait(_RECHECK_ROOM_S)
                    continue
                is_enough = evicted_bytes >= max(1, copy.size_bytes) * (1 + self._num_early - num_early)
                if is_enough and others and not has_paused:
                    has_paused = True  # the answer to the load that took the space may arrive after this refusal
                    await asyncio.sleep(_RETRY_PAUSE_S)
                    continue
                if victim is None or is_enough:
                    raise LoadFailed(f"{error.code}: {error.detail}", model=copy.model_id) from None
                logger.warning("%s; unloading %s for it", error.message, victim.model_id)
                evicted_bytes += victim.size_bytes
                await asyncio.wait([self._unloads.start(victim, is_eviction=True, make_room_for=copy.model_id)])

    async def _load_once(self, copy: LocalCopy, info: ModelInfo) -> LoadAnswer:
        started_s, copy.prepared_s = time.monotonic(), 0.0
        answer = await self._runtime.load(copy.model_id, info, self._load_timeout_s)
        prepared_s = (copy.prepared_s or time.monotonic()) - started_s
        self._preparation_times = self._preparation_times.measured(copy.model_id, answer.size_bytes, prepared_s)
        return answer

    async def _unload_unknown(self) -> bool:
        """Unload the models that the runtime holds without a copy, as after a load that timed out. Return whether there were any."""
        unknown = [
            model.model_id
            for model in self._reported()
            if model.state is CopyState.LOADED and self._copies.get(model.model_id) is None
        ]
        for model_id in unknown:
            logger.warning("unloading %s, which the runtime holds and this pod did not load", model_id)
            with contextlib.suppress(Unavailable):
                await self._runtime.unload(model_id)
        return bool(unknown)

    def _has_busy_copy(self, loading: LocalCopy) -> bool:
        return any(copy is not loading and not copy.is_pending and copy.size_bytes for copy in self._copies)

    async def _expected_size_bytes(self, copy: LocalCopy) -> int:
        known = copy.expected_bytes or self._sizes_bytes.get(copy.model_id)
        return known or await self._runtime.predict_size(copy.model_id, copy.info) or self._default_size_bytes

    def room_wait_s(self) -> float | None:
        """Return when the first model in use is expected to be idle, so that it can be unloaded; None if that is unknown."""
        return self._admission.wait_s()

    async def _record_failure(self, copy: LocalCopy, error: LoadFailed) -> None:
        self._metrics.load_failed(copy.model_id)
        self.num_failed_in_a_row += 1
        logger.warning("model failed to load", extra={"model": copy.model_id, "error": error.detail})
        # This pod leaves the record by itself. That does not mean that it must unload.
        copy.is_announced = False
        copy.failure = error.detail
        await log_errors(
            self._record_updates.failed(copy.model_id, error.detail, at_ms=epoch_ms(), lasting=error.lasting)
        )
