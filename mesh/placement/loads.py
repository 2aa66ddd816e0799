"""Loading and unloading on this pod's runtime: one load a model however many ask, victims out first, failures recorded with their cause.

A load that nobody waits for any more goes on; only `drop` ends it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.errors import LoadFailed, MeshError, NotFound, Overloaded, StoreError, Unavailable
from mesh.metrics import Metrics
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.eviction import plan_eviction
from mesh.placement.load_times import LoadTimes
from mesh.placement.record_updates import RecordUpdates
from mesh.types import LoadAnswer, ModelInfo, RuntimeClient, RuntimeLimits

logger = logging.getLogger(__name__)

_ROOM_TIMEOUT_S = 180.0  # ModelMesh's: a load that finds no room by then is given up, and not held against the model
_SPARE_BUSY_S = 5.0  # after it, models in use must make room: they finish what they run and are then unloaded
_DRAIN_TIMEOUT_S = 120.0
_RUNTIME_RETRY_S = 60.0  # a runtime that says UNAVAILABLE gets this long to come back
_RETRY_PAUSE_S = 0.2
_UNLOAD_RETRIES_S = (0.5, 1.0, 2.0, 5.0)
_UNLOAD_RETRY_S = 10.0
_UNLOAD_ATTEMPTS = 90


class _DeclinedError(Exception):
    """Not loaded, and nothing is wrong with it."""


class LocalLoads:
    """`load_timeout_s` 0: what the runtime asks for. `begin` must be called with its limits before the first load."""

    def __init__(
        self,
        runtime: RuntimeClient,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        changes: Changes,
        metrics: Metrics,
        *,
        load_timeout_s: float,
        publish: Callable[[], Awaitable[None]],
    ) -> None:
        """`publish` writes this pod's record: other pods read there that a load has ended."""
        self._publish = publish
        self._runtime = runtime
        self._record_updates = record_updates
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._load_timeout_s = load_timeout_s
        self._default_size_bytes = 0
        self._slots: asyncio.Semaphore | None = None
        self._ready = asyncio.Event()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._sizes_bytes: dict[
            str, int
        ] = {}  # as they turned out, by model id: a model that comes back needs no prediction
        self.times = LoadTimes()

    def runtime_ready(self, limits: RuntimeLimits) -> None:
        """The runtime is ready and holds nothing."""
        self._copies.capacity_bytes = limits.capacity_bytes
        self._default_size_bytes = limits.default_model_size_bytes
        self._load_timeout_s = self._load_timeout_s or limits.model_loading_timeout_s
        if self._slots is None:
            self._slots = asyncio.Semaphore(limits.max_loading_concurrency)
        self._ready.set()
        self._changes.notify()

    def runtime_lost(self) -> None:
        """The runtime is away: loads wait for it."""
        self._ready.clear()

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    def load(self, model_id: str, info: ModelInfo, *, last_used_ms: int, urgent: bool = True) -> asyncio.Task[None]:
        """The model's one load; a new one if none is under way. Wait for it with `asyncio.wait`: `drop` cancels it.

        It ends well also when the load failed for a reason that is the model's own: that is then recorded. It raises Overloaded when there was no
        room and Unavailable when the runtime went away. `urgent` False: it displaces only what was used before `last_used_ms`.
        """
        task = self._loading.get(model_id)
        if task is not None:
            self._copies.touch(model_id, last_used_ms)
            return task
        copy = LocalCopy(model_id, info, last_used_ms=last_used_ms)
        previous = self._copies.get(model_id)
        if previous is not None and previous.state is not CopyState.UNLOADING:
            copy.expected_bytes = previous.size_bytes or previous.expected_bytes
            copy.is_announced = previous.is_announced
        task = asyncio.create_task(self._load(copy, urgent), name=f"load {model_id}")
        self._loading[model_id] = task
        task.add_done_callback(lambda done: self._ended(model_id, done))
        if previous is None or previous.state is not CopyState.UNLOADING:
            self._copies.add(copy)
        return task

    def task(self, model_id: str) -> asyncio.Task[None] | None:
        """The load that is under way."""
        return self._loading.get(model_id)

    def forget(self, model_id: str) -> None:
        """It is no longer registered."""
        self.times = self.times.without(model_id)
        self._sizes_bytes.pop(model_id, None)

    async def unload(self, model_id: str) -> None:
        """Unload, or stop loading. Returns when it is gone; idempotent."""
        task = self._loading.get(model_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        copy = self._copies.get(model_id)
        if copy is not None:
            await asyncio.shield(self._unload(copy))

    async def close(self) -> None:
        tasks = [*self._loading.values(), *self._unloading.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    def _ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        self._loading.pop(model_id, None)
        if not task.cancelled() and task.exception() is not None:
            logger.info("load of %s ended: %s", model_id, task.exception())
        self._changes.notify()

    async def _load(self, copy: LocalCopy, urgent: bool) -> None:
        model_id = copy.model_id
        leaving = self._unloading.get(model_id)
        if leaving is not None:
            await asyncio.wait([leaving])
        self._copies.add(copy)
        keep = False
        try:
            await self._announce(copy)
            await self._ready.wait()
            assert self._slots is not None
            async with self._slots:
                await self._admit(copy, urgent)
                self._copies.set_state(copy, CopyState.LOADING)
                begun_s = time.monotonic()
                answer = await self._load_on_runtime(copy)
                copy.size_bytes, copy.max_concurrency = answer.size_bytes or copy.size_bytes, answer.max_concurrency
                self._sizes_bytes[model_id] = copy.size_bytes
                seconds = time.monotonic() - begun_s
            self.times = self.times.measured(model_id, copy.size_bytes, seconds)
            self._metrics.loaded(model_id, seconds)
            keep = True
            logger.info(
                "model loaded", extra={"model": model_id, "seconds": round(seconds, 3), "bytes": copy.size_bytes}
            )
            copy.loaded_s = time.monotonic()
            self._copies.set_state(copy, CopyState.LOADED)
            # Before callers hear of it: every pod that reads the record then says LOADED, too.
            await self._publish()
        except LoadFailed as error:
            await self._failed(copy, error.detail)
        except _DeclinedError:
            pass
        finally:
            if not keep:
                self._copies.remove(copy)
                await self._log_errors(self._record_updates.gone(model_id))
        self.trim()

    async def _announce(self, copy: LocalCopy) -> None:
        try:
            await self._record_updates.loading(
                copy.model_id, copy.info, started_ms=copy.started_ms, last_used_ms=copy.last_used_ms
            )
            copy.is_announced = True
        except StoreError as error:
            # a store that is away must not keep a known model from being served; the next sweep announces it
            logger.warning("model %s is loaded unannounced: %s", copy.model_id, error.message)

    async def _load_on_runtime(self, copy: LocalCopy) -> LoadAnswer:
        """What doesn't fit although it should is given room, one idle model after the other; a runtime that restarts is waited for."""
        give_up_s = time.monotonic() + _RUNTIME_RETRY_S
        refusal = ""
        while True:
            await self._ready.wait()
            try:
                return await self._runtime.load(copy.model_id, copy.info, self._load_timeout_s)
            except Unavailable as error:
                if time.monotonic() > give_up_s:
                    raise
                logger.info("%s; trying again", error.message)
                await asyncio.sleep(_RETRY_PAUSE_S)
            except Overloaded as error:
                victim = next(iter(self._idle()), None)
                # the same words after somebody has left: it isn't room that is missing
                if victim is None or error.message == refusal or await self._never_fits(copy):
                    raise LoadFailed(f"{error.code}: {error.detail}", model=copy.model_id) from None
                refusal = error.message
                logger.warning("%s; unloading %s for it", error.message, victim.model_id)
                await self._evict(victim)

    async def _never_fits(self, copy: LocalCopy) -> bool:
        try:
            return not (await self._runtime.fit(copy.model_id, copy.info, sizes_only=True)).fits
        except MeshError:
            return False

    async def _admit(self, copy: LocalCopy, urgent: bool) -> None:
        """Reserve room for the predicted size, once there is."""
        known = copy.expected_bytes or self._sizes_bytes.get(copy.model_id)
        predicted = known or await self._runtime.predict_size(copy.model_id, copy.info) or self._default_size_bytes
        give_up_s = time.monotonic() + _ROOM_TIMEOUT_S
        spare_busy_until_s = time.monotonic() + _SPARE_BUSY_S
        while True:
            now_s = time.monotonic()
            wanted_ms = None if urgent or self._copies.num_waiting(copy.model_id) else copy.last_used_ms
            room = plan_eviction(
                self._copies.usage(),
                copy.model_id,
                predicted,
                last_used_ms=wanted_ms,
                spare_busy=now_s < spare_busy_until_s,
            )
            if room.refusal:
                raise LoadFailed(room.refusal, model=copy.model_id, limit=self._copies.capacity_bytes, value=predicted)
            if room.declined:
                logger.info("model %s is not loaded: all that it would displace was used more recently", copy.model_id)
                raise _DeclinedError
            if not room.wait:
                copy.size_bytes = predicted
                return
            if now_s > give_up_s:
                raise Overloaded(
                    f"no room for its {predicted} bytes within {_ROOM_TIMEOUT_S:.0f} s",
                    model=copy.model_id,
                    limit=self._copies.capacity_bytes,
                    value=predicted,
                    retry_after_s=30,
                )
            for victim_id in room.victims:
                victim = self._copies.get(victim_id)
                if victim is not None and victim.is_loaded:
                    self._start_unload(victim, evicted=True)
            await self._changes.wait(
                max(0.05, min(give_up_s, spare_busy_until_s if now_s < spare_busy_until_s else give_up_s) - now_s)
            )

    def trim(self) -> None:
        """After a load that turned out larger than predicted: what no longer fits goes, as far as it is idle. What isn't goes at a later look."""
        while self._copies.usage().used_bytes - self._copies.usage().unloading_bytes > self._copies.capacity_bytes:
            victim = next(iter(self._idle()), None)
            if victim is None:
                return
            self._start_unload(victim, evicted=True)

    def _idle(self) -> list[LocalCopy]:
        """Loaded copies that nobody uses, the longest unused first; never the newest, which somebody has just asked for."""
        num_users = {model.model_id: model.num_users for model in self._copies.usage().models}
        loaded = sorted(
            (copy for copy in self._copies if copy.is_loaded), key=lambda copy: (copy.last_used_ms, copy.started_ms)
        )
        newest = max(loaded, key=lambda copy: copy.started_ms, default=None)
        alone = not any(copy.is_pending for copy in self._copies)
        return [copy for copy in loaded if num_users.get(copy.model_id, 0) == 0 and not (alone and copy is newest)]

    async def _failed(self, copy: LocalCopy, message: str) -> None:
        self._metrics.load_failed(copy.model_id)
        logger.warning("model failed to load", extra={"model": copy.model_id, "error": message})
        copy.is_announced = False  # its absence from the record is our own doing
        await self._log_errors(self._record_updates.failed(copy.model_id, message, at_ms=epoch_ms()))

    async def _evict(self, copy: LocalCopy) -> None:
        await asyncio.wait([self._start_unload(copy, evicted=True)])

    def _unload(self, copy: LocalCopy) -> asyncio.Task[None]:
        return self._start_unload(copy, evicted=False)

    def _start_unload(self, copy: LocalCopy, *, evicted: bool) -> asyncio.Task[None]:
        """From here on no new request is sent to this copy."""
        task = self._unloading.get(copy.model_id)
        if task is None:
            self._copies.set_state(copy, CopyState.UNLOADING)
            if evicted:
                self._metrics.evicted(copy.model_id)
            logger.info("model leaves", extra={"model": copy.model_id, "evicted": evicted})
            task = asyncio.create_task(self._unload_copy(copy), name=f"unload {copy.model_id}")
            self._unloading[copy.model_id] = task
            task.add_done_callback(lambda _: self._unloading.pop(copy.model_id, None))
        return task

    async def _unload_copy(self, copy: LocalCopy) -> None:
        await self._log_errors(self._record_updates.gone(copy.model_id, last_used_ms=copy.last_used_ms))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                while self._copies.in_flight(copy.model_id):
                    await self._changes.wait()
        for attempt in range(_UNLOAD_ATTEMPTS):
            try:
                await self._runtime.unload(copy.model_id)
                break
            except Unavailable as error:
                if not self._ready.is_set():
                    break  # the runtime is gone, and the memory with it
                logger.warning("%s (attempt %d)", error.message, attempt + 1)
                await asyncio.sleep(_UNLOAD_RETRIES_S[attempt] if attempt < len(_UNLOAD_RETRIES_S) else _UNLOAD_RETRY_S)
        self._copies.remove(copy)

    async def _log_errors(self, work: Awaitable[None]) -> None:
        """The store may be away, or the registration gone; the sweep puts right what is then wrong."""
        try:
            await work
        except (StoreError, NotFound) as error:
            logger.debug("not announced: %s", error.message)
        except MeshError as error:
            logger.warning("not announced: %s", error.message)
