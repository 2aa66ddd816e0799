"""Follows the local runtime: ready, gone, or restarted, after which its models are loaded again."""

import asyncio
import logging
import time
from collections.abc import Callable

from common.changes import Changes
from common.model_state import CopyState, ModelState
from mesh.errors import MeshError
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.loads import LocalLoads
from mesh.types import RuntimeClient, RuntimeLimits, RuntimeSnapshot

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 180.0  # as in ModelMesh, but a supervised runtime may start later, so the wait is repeated
_READY_RETRY_S = 2.0  # pause after a runtime that reports a permanent failure: another one may replace it
_FOREIGN_REFRESH_S = 0.3  # time for a runtime without repertory.RuntimeState to settle


class RuntimeMonitor:
    """`first_ready` is called once, when the runtime is ready for the first time; `lost` whenever it does not answer any more.

    `is_mute` returns whether the runtime answers no requests although it reports its state.
    """

    def __init__(
        self,
        runtime: RuntimeClient,
        copies: LocalCopies,
        loads: LocalLoads,
        changes: Changes,
        *,
        first_ready: Callable[[], None],
        changed: Callable[[RuntimeSnapshot], None],
        lost: Callable[[], None],
        is_mute: Callable[[], bool],
    ) -> None:
        self._runtime = runtime
        self._copies = copies
        self._loads = loads
        self._changes = changes
        self._first_ready = first_ready
        self._changed = changed
        self._lost = lost
        self._is_mute = is_mute
        self._connected = False
        self.limits: RuntimeLimits | None = None
        self.snapshot = RuntimeSnapshot(0)
        self._models: dict[str, ModelState] = {}
        self._snapshot_s = 0.0
        self._looking = asyncio.Lock()
        self._looked_s = 0.0

    @property
    def is_ready(self) -> bool:
        """Return whether the runtime accepts loads and requests, or will when its engine has restarted, and its first state is known."""
        return (
            self._connected and self._snapshot_s > 0 and self.snapshot.engine_state != "stopped" and not self._is_mute()
        )

    @property
    def is_serving(self) -> bool:
        """Return whether the runtime answers requests now."""
        return self._connected and (self.snapshot.ready or not self.snapshot.engine_state) and not self._is_mute()

    def serves(self, copy: LocalCopy) -> bool:
        """Return whether the runtime reports that this copy answers requests. After a restart of the engine, models return one by one.

        A snapshot taken before the load ended does not include it.
        """
        model = self.model(copy.model_id)
        return self.is_serving and (
            model is None or model.state is CopyState.LOADED or copy.loaded_s >= self._snapshot_s
        )

    def model(self, model_id: str) -> ModelState | None:
        return self._models.get(model_id)

    def busy_s(self, model_id: str) -> float:
        """Return the runtime's estimate of when the model's running requests end; 0 if it reports none."""
        model = self._models.get(model_id)
        return model.busy_s if model is not None else 0.0

    async def run(self) -> None:
        await self._await_ready()
        self._connected = True
        self._first_ready()
        async for snapshot in self._runtime.watch():
            gone = not snapshot.ready and not snapshot.engine_state
            if gone and self._connected:
                logger.warning("the runtime does not answer")
                self._connected = False
                self._loads.runtime_lost()
                self._lost()
            self._set_snapshot(snapshot)
            if not gone and not self._connected:
                await self._returned(snapshot)
                self._connected = True
            if snapshot.capacity_bytes and not gone:
                self._copies.capacity_bytes = snapshot.capacity_bytes
            self._changed(snapshot)
            self._changes.notify()

    async def refresh(self) -> None:
        """Return when a snapshot of the runtime is known that is newer than this call."""
        if self.snapshot.foreign:
            await self._changes.wait(_FOREIGN_REFRESH_S)
            return
        called_s = time.monotonic()
        async with self._looking:
            # A concurrent refresh may have read a snapshot that is new enough.
            if self._looked_s < called_s:
                asked_s = time.monotonic()
                snapshot = await self._runtime.look()
                if snapshot is not None and self._connected:
                    self._looked_s = asked_s
                    self._set_snapshot(snapshot)
                    self._changed(snapshot)
                    self._changes.notify()
        while self._looked_s < called_s and self._snapshot_s < called_s:
            await self._changes.wait()

    def _set_snapshot(self, snapshot: RuntimeSnapshot) -> None:
        self.snapshot = snapshot
        self._models = {model.model_id: model for model in snapshot.models}
        self._snapshot_s = time.monotonic()

    async def _await_ready(self) -> RuntimeLimits:
        while True:
            try:
                self.limits = await self._runtime.wait_ready(_READY_TIMEOUT_S)
            except MeshError as error:
                logger.error("%s", error.message)
                await asyncio.sleep(_READY_RETRY_S)
            else:
                self._loads.runtime_ready(self.limits)
                return self.limits

    async def _returned(self, snapshot: RuntimeSnapshot) -> None:
        """Load what the runtime has lost. If it has lost everything, it is a new process, which must become ready first."""
        ours = [copy for copy in self._copies if copy.is_loaded]
        kept = {model.model_id for model in snapshot.models if model.state is CopyState.LOADED}
        lost = [copy for copy in ours if copy.model_id not in kept]
        logger.warning("the runtime answers again; loading %d of %d models again", len(lost), len(ours))
        if len(lost) == len(ours):
            await self._await_ready()
        elif self.limits is not None:
            self._loads.runtime_ready(self.limits)
        self._reload(lost)

    def _reload(self, lost: list[LocalCopy]) -> None:
        for copy in sorted(lost, key=lambda copy: copy.last_used_ms, reverse=True):
            self._loads.load(copy.model_id, copy.info, last_used_ms=copy.last_used_ms, urgent=False)
