"""The local runtime's life, as placement follows it: ready, gone, back again; what it lost is loaded again."""

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

_READY_TIMEOUT_S = 180.0  # ModelMesh gives up here; a supervised runtime may come later, so it is asked again
_READY_RETRY_S = (
    2.0  # one that says at once that it never will be is asked again all the same: another may take its place
)
_FOREIGN_REFRESH_S = 0.3  # time for a runtime without repertory.RuntimeState to settle


class RuntimeMonitor:
    """`first_ready` is called once, when the runtime is ready for the first time."""

    def __init__(
        self,
        runtime: RuntimeClient,
        copies: LocalCopies,
        loads: LocalLoads,
        changes: Changes,
        *,
        first_ready: Callable[[], None],
        changed: Callable[[RuntimeSnapshot], None],
    ) -> None:
        self._runtime = runtime
        self._copies = copies
        self._loads = loads
        self._changes = changes
        self._first_ready = first_ready
        self._changed = changed
        self._connected = False
        self.limits: RuntimeLimits | None = None
        self.snapshot = RuntimeSnapshot(0)
        self._models: dict[str, ModelState] = {}
        self._snapshot_s = 0.0
        self._looking = asyncio.Lock()
        self._looked_s = 0.0

    @property
    def is_ready(self) -> bool:
        """It takes loads and requests, or will when its engine is back."""
        return self._connected and self.snapshot.engine_state != "stopped"

    @property
    def is_serving(self) -> bool:
        """It answers requests now."""
        return self._connected and (self.snapshot.ready or not self.snapshot.engine_state)

    def serves(self, copy: LocalCopy) -> bool:
        """It answers requests for this copy now, by its own account; after an engine's death a model takes a moment to come back.

        A snapshot taken before the load ended does not include it.
        """
        model = self.model(copy.model_id)
        return self.is_serving and (
            model is None or model.state is CopyState.LOADED or copy.loaded_s >= self._snapshot_s
        )

    def model(self, model_id: str) -> ModelState | None:
        return self._models.get(model_id)

    async def run(self) -> None:
        await self._await_ready()
        self._connected = True
        self._first_ready()
        async for snapshot in self._runtime.watch():
            gone = not snapshot.ready and not snapshot.engine_state
            if gone and self._connected:
                logger.warning("the runtime is gone")
                self._connected = False
                self._loads.runtime_lost()
            self._set_snapshot(snapshot)
            if not gone and not self._connected:
                await self._returned(snapshot)
                self._connected = True
            if snapshot.capacity_bytes and not gone:
                self._copies.capacity_bytes = snapshot.capacity_bytes
            self._changed(snapshot)
            self._changes.notify()

    async def refresh(self) -> None:
        """Returns when the runtime has told of itself what is newer than this call, and so than anything that it answered before."""
        if self.snapshot.foreign:
            await self._changes.wait(_FOREIGN_REFRESH_S)
            return
        called_s = time.monotonic()
        async with self._looking:
            # who waited for another's question has its answer, if it was asked late enough
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
        """Find out whether the connection broke or the process is new. A new process holds no models, and must become ready first."""
        ours = [copy for copy in self._copies if copy.is_loaded]
        kept = {model.model_id for model in snapshot.models if model.state is CopyState.LOADED}
        lost = [copy for copy in ours if copy.model_id not in kept]
        logger.warning("the runtime is back; %d of %d models are to be loaded again", len(lost), len(ours))
        if len(lost) == len(ours):
            await self._await_ready()
        elif self.limits is not None:
            self._loads.runtime_ready(self.limits)
        self._reload(lost)

    def _reload(self, lost: list[LocalCopy]) -> None:
        for copy in sorted(lost, key=lambda copy: copy.last_used_ms, reverse=True):
            self._loads.load(copy.model_id, copy.info, last_used_ms=copy.last_used_ms, urgent=False)
