"""Placement on this pod: where a model is loaded, what the pod holds against what the registry says, and each model's state over all pods.

Implements mesh.types.Loader. Knows the registry, this pod's loads and that other pods can be asked to load; nothing of how requests travel.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.errors import MeshError, NotFound, StoreError, Unavailable
from mesh.placement.copies import LocalCopies
from mesh.placement.eviction import make_room
from mesh.placement.load_times import remaining_s
from mesh.placement.loads import LocalLoads
from mesh.placement.model_status import OwnCopy, blocked_for_s, may_load, status_of
from mesh.placement.pod_selection import Pod, choose_pod
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import CAPACITY_UNIT_BYTES, InstanceRecord, ModelRecord
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, RuntimeClient, RuntimeSnapshot, StatusInfo

logger = logging.getLogger(__name__)

_ENDED = (ModelStatus.LOADED, ModelStatus.LOADING_FAILED, ModelStatus.NOT_FOUND)
_SWEEP_S = 10.0
_FAILURE_KEPT_MS = 900_000  # ModelMesh's 15 minutes
_REMOTE_START_S = 5.0  # a pod that was asked to load has announced it by then
_UNLOAD_S = 60.0


class PeerLoads(Protocol):
    async def load(self, pod: InstanceRecord, model_id: str, *, last_used_ms: int) -> None:
        """Have another pod load a model; returns when it has begun. Raises MeshError if the pod can't be asked or refuses."""


class Placement:
    def __init__(
        self,
        registry: Registry,
        runtime: RuntimeClient,
        announcer: RecordUpdates,
        copies: LocalCopies,
        loads: LocalLoads,
        peers: PeerLoads,
        changes: Changes,
        *,
        failure_expiry_s: float,
    ) -> None:
        self._registry = registry
        self._runtime = runtime
        self._announcer = announcer
        self._copies = copies
        self._loads = loads
        self._follower = RuntimeMonitor(
            runtime, copies, loads, changes, first_ready=self._first_ready, changed=self._runtime_changed
        )
        self._peers = peers
        self._changes = changes
        self._failure_expiry_s = failure_expiry_s
        self._own_id = registry.instances.own_id
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def runtime(self) -> RuntimeMonitor:
        return self._follower

    def start(self) -> None:
        self._registry.models.table.listen(self._record_changed)
        self._registry.instances.table.listen(lambda *_: self._changes.notify())
        self._spawn(self._follower.run())
        self._spawn(self._sweep_for_ever())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        await self._loads.close()

    async def ensure_loaded(
        self,
        model_id: str,
        *,
        last_used_ms: int = 0,
        wait: bool = False,
        retry_failed: bool = False,
        here: bool = False,
    ) -> StatusInfo:
        """As Loader. `retry_failed`: somebody asks for it by name, so a failure that still holds it back is forgotten.
        `here`: on this pod, whatever others have.

        Raises NotFound; with `wait` also Overloaded (no room while all is in use) and Unavailable (the runtime went away).
        """
        record = await self._registry.models.find(model_id)
        if record is None:
            raise NotFound(f"model {model_id} not found")
        used_ms = last_used_ms or epoch_ms()
        self._copies.touch(model_id, used_ms)
        status = self.status(model_id)
        now = self._status_here(model_id) if here else status.status
        if now is ModelStatus.LOADED or (now is ModelStatus.LOADING and not wait):
            return status
        if now is not ModelStatus.LOADING:
            if retry_failed:
                await self._forgive(model_id)
                record = self._registry.models.get(model_id) or record
            elif self._blocked_for_s(model_id, record) > 0:
                return status
            await self._begin(
                model_id, record, last_used_ms=used_ms, urgent=last_used_ms == 0 or retry_failed, here=here
            )
        return await self._outcome(model_id) if wait else self.status(model_id)

    async def unload(self, model_id: str) -> None:
        await self._announcer.drop_everywhere(model_id)
        await self._loads.drop(model_id)
        if self._quarantined(model_id):
            await self._forgive(model_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNLOAD_S):
                while any(
                    model_id in pod.copies for pod_id, pod in self._registry.instances.live() if pod_id != self._own_id
                ):
                    await self._changes.wait()

    def status(self, model_id: str) -> StatusInfo:
        record = self._registry.models.get(model_id)
        return status_of(
            model_id,
            record,
            own_id=self._own_id,
            own=self._own_copy(model_id),
            own_model=self._follower.model(model_id),
            pods=self._pods() if record is not None and record.instance_ids else {},
        )

    async def progress(self, model_id: str) -> AsyncIterator[StatusInfo]:
        last: StatusInfo | None = None
        while True:
            status = self.status(model_id)
            if status != last:
                last = status
                yield status
            if status.status in _ENDED:
                return
            await self._changes.wait()

    def expected_wait_s(self, model_id: str) -> float:
        copy = self._copies.get(model_id)
        if copy is not None and copy.loaded:
            return 0.0 if self._follower.serving else 1.0
        expected_s = self._loads.times.expected_s(model_id, copy.size_bytes if copy else 0)
        if copy is None or copy.state is CopyState.UNLOADING:
            since_ms = min(self._remote_since(model_id), default=0)
            if since_ms:
                return remaining_s(expected_s, max(0.0, (epoch_ms() - since_ms) / 1000), 0.0)
            limits = self._follower.limits
            return expected_s * (1 + self._loads.num_loading / (limits.max_loading_concurrency if limits else 1))
        model = self._follower.model(model_id)
        progress = model.progress if model is not None and model.state is CopyState.LOADING else 0.0
        return remaining_s(expected_s, time.monotonic() - copy.started_s, progress)

    def would_unload(self, model_id: str, size_bytes: int) -> tuple[str, ...]:
        """Whom this pod would unload for a model of this size if it were asked for now; models in use only if the idle ones don't suffice."""
        copy = self._copies.get(model_id)
        if copy is not None and copy.loaded:
            return ()
        return make_room(self._copies.usage(), model_id, size_bytes, patient=False).victims

    def expected_load_s(self, model_id: str) -> float:
        """A whole load, from beginning to end."""
        return self._loads.times.expected_s(model_id)

    async def withdraw(self) -> None:
        """This pod is leaving: its copies are no longer to be asked for."""
        copies = list(self._copies)
        for copy in copies:
            copy.announced = False
        try:
            for copy in copies:
                await self._announcer.gone(copy.model_id, last_used_ms=copy.last_used_ms)
        except StoreError as error:
            # seconds for each model would outlast the grace period, and the others see that this pod is gone
            logger.warning("this pod's copies stay in the registry: %s", error.message)

    def load_here(self, model_id: str, *, last_used_ms: int, urgent: bool = True) -> None:
        record = self._registry.models.get(model_id)
        if record is not None:
            self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent)

    def _first_ready(self) -> None:
        """The runtime is empty: what the registry says is here, from before this process, is loaded again."""
        mine = [
            (model_id, record)
            for model_id, record in self._registry.models.table.items()
            if self._own_id in record.instance_ids
        ]
        for model_id, record in sorted(mine, key=lambda item: item[1].last_used_ms, reverse=True):
            self.load_here(model_id, last_used_ms=record.last_used_ms, urgent=False)

    def _runtime_changed(self, snapshot: RuntimeSnapshot) -> None:
        """A model that the runtime itself has given up is no longer loaded here, with the runtime's reason."""
        for model in snapshot.models:
            copy = self._copies.get(model.model_id)
            if copy is not None and copy.loaded and model.state in (CopyState.FAILED, CopyState.QUARANTINED):
                copy.announced = False
                self._copies.remove(copy)
                self._spawn(self._give_up(model.model_id, model.error or f"{model.state} by the runtime"))
            elif copy is not None and copy.loaded and model.weight_bytes and not copy.measured:
                copy.measured = True
                self._spawn(self._note_weight(model.model_id, model.weight_bytes))

    def _quarantined(self, model_id: str) -> bool:
        """It took the engine down, and would again: it is loaded no more until somebody asks for it by name."""
        model = self._follower.model(model_id)
        return model is not None and model.state is CopyState.QUARANTINED

    async def _forgive(self, model_id: str) -> None:
        """To a runtime, a model that is unloaded on purpose has a new chance."""
        if self._quarantined(model_id):
            with contextlib.suppress(Unavailable):
                await self._runtime.unload(model_id)
        await self._announcer.forgive(model_id)

    async def _note_weight(self, model_id: str, weight_bytes: int) -> None:
        with contextlib.suppress(StoreError):
            await self._announcer.measured(model_id, weight_bytes)

    async def _give_up(self, model_id: str, error: str) -> None:
        with contextlib.suppress(StoreError):
            await self._announcer.failed(model_id, error, at_ms=epoch_ms())

    async def _begin(self, model_id: str, record: ModelRecord, *, last_used_ms: int, urgent: bool, here: bool) -> None:
        pods = self._pods()
        if not here and len(pods) > 1:
            target = await self._choose(model_id, record, pods)
            if target is not None and not target.local:
                try:
                    await self._peers.load(pods[target.instance_id], model_id, last_used_ms=last_used_ms)
                    return
                except MeshError as error:
                    logger.warning(
                        "model %s: %s can't load it, trying here: %s", model_id, target.instance_id, error.message
                    )
        self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent)

    async def _choose(self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord]) -> Pod | None:
        size_bytes = await self._runtime.predict_size(model_id, record.info) if self._follower.serving else None
        limits = self._follower.limits
        now_ms = epoch_ms()
        candidates = [
            self._own_pod() if pod_id == self._own_id else _pod(pod_id, pod)
            for pod_id, pod in pods.items()
            if may_load(record, pod_id, now_ms=now_ms, expiry_s=self._failure_expiry_s)
            and (not self._quarantined(model_id) if pod_id == self._own_id else pod.http_address)
        ]
        return choose_pod(candidates, size_bytes or (limits.default_model_size_bytes if limits else 0))

    def _own_pod(self) -> Pod:
        usage = self._copies.usage()
        return Pod(
            self._own_id,
            True,
            usage.capacity_bytes,
            usage.free_bytes,
            usage.lru_ms,
            len(self._copies),
            self._loads.num_loading,
        )

    async def _outcome(self, model_id: str) -> StatusInfo:
        started_s = time.monotonic()
        while True:
            task = self._loads.task(model_id)
            if task is not None:
                # not shield: a load that is dropped would take those who wait for it along
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
                return self.status(model_id)
            status = self.status(model_id)
            starting = status.status is ModelStatus.NOT_LOADED and time.monotonic() - started_s < _REMOTE_START_S
            if status.status is not ModelStatus.LOADING and not starting:
                return status
            await self._changes.wait(_REMOTE_START_S)

    def _blocked_for_s(self, model_id: str, record: ModelRecord) -> float:
        return blocked_for_s(
            record,
            own_id=self._own_id,
            pods=self._pods(),
            now_ms=epoch_ms(),
            expiry_s=self._failure_expiry_s,
            quarantined=self._quarantined(model_id),
        )

    def blocked_for_s(self, model_id: str) -> float:
        """How long a failed model is not tried again, unless asked for by name."""
        record = self._registry.models.get(model_id)
        return self._blocked_for_s(model_id, record) if record else 0.0

    def _status_here(self, model_id: str) -> ModelStatus:
        if self._loads.task(model_id) is not None:
            return ModelStatus.LOADING
        copy = self._copies.get(model_id)
        return ModelStatus.LOADED if copy is not None and copy.loaded else ModelStatus.NOT_LOADED

    def _own_copy(self, model_id: str) -> OwnCopy | None:
        copy = self._copies.get(model_id)
        if copy is None:
            return None
        # one that leaves and is already wanted again is on its way
        state = CopyState.QUEUED if copy.state is CopyState.UNLOADING and self._loads.task(model_id) else copy.state
        return OwnCopy(state, copy.started_ms, copy.size_bytes, self._follower.model(model_id))

    def _pods(self) -> dict[str, InstanceRecord]:
        return dict(self._registry.instances.live())

    def _remote_since(self, model_id: str) -> list[int]:
        record = self._registry.models.get(model_id)
        pods = self._pods()
        return (
            [since_ms for pod, since_ms in record.instance_ids.items() if pod in pods and pod != self._own_id]
            if record
            else []
        )

    def _record_changed(self, model_id: str, _: ModelRecord | None, new: ModelRecord | None) -> None:
        copy = self._copies.get(model_id)
        if copy is not None and copy.state is not CopyState.UNLOADING:
            withdrawn = copy.announced and new is not None and self._own_id not in new.instance_ids
            if new is None or withdrawn:
                copy.announced = False
                self._spawn(self._loads.drop(model_id))
        if new is None:
            self._loads.forget(model_id)
        self._changes.notify()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self._sweep()
            except StoreError as error:
                logger.warning("the registry is away: %s", error.message)

    async def _sweep(self) -> None:
        """Put right what a store that was away, a process that died, or a prediction that was too low left wrong."""
        self._loads.trim()
        for copy in self._copies:
            if copy.loaded and not copy.announced:
                try:
                    await self._announcer.loading(
                        copy.model_id, copy.info, started_ms=copy.started_ms, last_used_ms=copy.last_used_ms
                    )
                    copy.announced = True
                except NotFound:
                    await self._loads.drop(copy.model_id)
        if self._follower.limits is None:
            return
        now_ms = epoch_ms()
        for model_id, record in self._registry.models.table.items():
            if (
                self._own_id in record.instance_ids
                and self._copies.get(model_id) is None
                and self._loads.task(model_id) is None
            ):
                await self._announcer.gone(model_id)
            if now_ms - record.failed_in.get(self._own_id, now_ms) > _FAILURE_KEPT_MS and not self._quarantined(
                model_id
            ):
                await self._announcer.forgive_own(model_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("placement: %r", error, exc_info=error)


def _pod(pod_id: str, pod: InstanceRecord) -> Pod:
    capacity_bytes, used_bytes = pod.capacity_units * CAPACITY_UNIT_BYTES, pod.used_units * CAPACITY_UNIT_BYTES
    return Pod(
        pod_id,
        False,
        capacity_bytes,
        max(0, capacity_bytes - used_bytes),
        pod.lru_time_ms,
        pod.count,
        pod.loads_in_progress,
    )
