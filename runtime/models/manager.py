"""Manages the runtime's models: loading, unloading, reloading after an engine crash, and quarantine.

Operations on one id run in the order of their arrival; operations on different ids run concurrently.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import msgspec

from common.changes import Changes
from common.model_key import Dtype, ModelSettings
from common.public_uri import public_uri
from runtime.checkpoint.device_fit import cut_text
from runtime.config.schema import RuntimeConfig
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineDeath, EngineState
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFault,
    LoadFailed,
    ModelNotFound,
    Quarantined,
    RepertoryError,
    Unavailable,
)
from runtime.interfaces import ServedModel
from runtime.ipc.messages import Load
from runtime.models.entry import Entry
from runtime.models.model_key import fingerprint
from runtime.models.model_state import ModelView, Phase, Preparer, Progress
from runtime.models.operations import Operation, OperationKind, OperationQueue
from runtime.models.quarantine import Quarantine, quarantine_text
from runtime.models.source_check import is_current
from runtime.text.text_model import TextModel
from runtime.types import ModelFacts, ModelSource

log = logging.getLogger(__name__)

TextLoader = Callable[[Path, ModelSettings], TextModel]

_MAX_FAILURES_SHOWN = 64
_UNNOTICED_S = 0.2  # the longest time until a closed socket is reported as the engine's death
_COMING = (Phase.PULLING, Phase.PACKING, Phase.LOADING, Phase.RETURNING)


class Models:
    """Implements runtime.interfaces.ModelDirectory and the engine's EngineListener. Event loop only."""

    def __init__(self, config: RuntimeConfig, engine: EngineGroups, preparer: Preparer, load_text: TextLoader) -> None:
        self._config = config
        self._engine = engine
        self._preparer = preparer
        self._load_text = load_text
        self._entries: dict[str, Entry] = {}
        self._quarantine = Quarantine()
        self._slots = asyncio.Semaphore(config.max_loading_concurrency)
        self._threads = ThreadPoolExecutor(config.max_loading_concurrency, thread_name_prefix="text")
        self._closing = False
        self.changes = Changes()
        self._operations = OperationQueue(self.changes.notify)
        engine.listen(self)

    # Queries of the APIs

    def get(self, model_id: str) -> ServedModel:
        entry = self._entries.get(model_id)
        if entry is None:
            raise ModelNotFound(f"model {model_id!r} is not loaded here")
        match entry.phase:
            case Phase.LOADED:
                assert entry.served is not None
                entry.last_used_s = time.monotonic()
                return entry.served
            case Phase.RETURNING:
                raise Unavailable(f"model {entry.name!r} is coming back: the engine was restarted", retry_after_s=5.0)
            case Phase.QUARANTINED:
                raise Quarantined(entry.error)
            case _:
                raise ModelNotFound(f"model {model_id!r} is not loaded here: it is {entry.phase.value}")

    def list(self) -> Sequence[ServedModel]:
        self._engine.check()
        return [
            entry.served for entry in self._entries.values() if entry.phase is Phase.LOADED and entry.served is not None
        ]

    def views(self) -> Sequence[ModelView]:
        """Return all models that are loaded, loading, or failed recently."""
        return [entry.view() for entry in self._entries.values()]

    # Calls of the mesh

    async def load(self, model_id: str, source: ModelSource, settings: ModelSettings) -> ServedModel:
        """Load a model, or join a load of it that is running. Cancelling undoes the load unless other callers wait for it.

        Raises InvalidRequest, LoadFailed, Quarantined, Overloaded, Unavailable, DeadlineExceeded, Cancelled (unloaded meanwhile).
        """
        mark = fingerprint(source, settings)
        tail = self._operations.last(model_id)
        while tail is not None and tail.kind is OperationKind.RETURN and tail.mark == mark:
            await self._join(model_id, tail)
            tail = self._operations.last(model_id)
        if self._closing:
            raise _shutting_down()
        self._refuse_quarantined(model_id, mark)
        if tail is None:
            entry = self._entries.get(model_id)
            if entry is not None and entry.mark == mark and await self._is_current(entry):
                assert entry.served is not None
                return entry.served
            tail = self._operations.last(model_id)
        if tail is None or tail.kind is OperationKind.UNLOAD or tail.mark != mark:
            tail = self._operations.add(
                model_id, OperationKind.LOAD, mark, lambda: self._load(model_id, source, settings, mark)
            )
        await self._join(model_id, tail)
        entry = self._entries.get(model_id)
        if entry is None or entry.served is None:
            raise self._load_lost(model_id)
        return entry.served

    async def unload(self, model_id: str, *, grace_s: float, allow_retry: bool = False) -> None:
        """Unload a model. Its requests have `grace_s` to finish. Unknown ids are ignored. A running load is cancelled first.

        A quarantined model stays so unless `allow_retry`: an eviction may cross with the crash, and a mesh unloads after each failed load.
        Continues if the caller is cancelled.
        """
        if allow_retry:
            self._quarantine.allow_retry(model_id)
        tail = self._operations.last(model_id)
        entry = self._entries.get(model_id)
        if tail is None and entry is None:
            return
        if tail is None or tail.kind is not OperationKind.UNLOAD:
            if entry is not None and entry.phase in (Phase.LOADED, Phase.RETURNING):
                entry.phase = Phase.UNLOADING  # from now on new requests get NOT_FOUND
            if tail is not None:
                tail.cancel()
            tail = self._operations.add(model_id, OperationKind.UNLOAD, b"", lambda: self._unload(model_id, grace_s))
        await asyncio.shield(tail.task)

    async def purge(self) -> None:
        """Unload everything."""
        await asyncio.gather(
            *(self.unload(model_id, grace_s=self._config.grace_s) for model_id in {*self._entries, *self._operations})
        )

    async def stop_loads(self) -> None:
        """Cancel running loads and refuse new ones. Loaded models keep answering."""
        self._closing = True
        await self._operations.cancel_all()

    async def close(self) -> None:
        """Release all models. The owner of the engine stops it."""
        await self.stop_loads()
        for entry in self._entries.values():
            entry.release()
        self._threads.shutdown(wait=False)

    # Events of the engine

    def engine_ready(self, models: Collection[str]) -> None:
        for entry in self._entries.values():
            if entry.phase is Phase.RETURNING and entry.model_id in models:
                self._operations.add(entry.model_id, OperationKind.RETURN, entry.mark, partial(self._return, entry))

    def engine_died(self, death: EngineDeath) -> None:
        names = {*death.loading, *([death.stepping] if death.stepping is not None else [])}
        self._quarantine.strike([(name, self._entries[name].mark) for name in sorted(names) if name in self._entries])
        for entry in self._entries.values():
            if entry.model_id not in death.models:
                continue
            if entry.phase is Phase.LOADED:
                entry.phase = Phase.RETURNING
            if entry.phase is Phase.RETURNING and self._quarantine.holds(entry.model_id, entry.mark):
                self._isolate(entry)
        self.changes.notify()

    def engine_dropped(self, model_id: str, error: RepertoryError) -> None:
        entry = self._entries.get(model_id)
        if entry is not None and entry.phase is Phase.LOADED:
            log.error("the engine gave up %s: %s", model_id, error.message)
            entry.release()
            self._fail(entry, error)
            self.changes.notify()

    async def _join(self, model_id: str, operation: Operation) -> None:
        if not await self._operations.join(operation):
            raise self._load_lost(model_id)

    def _load_lost(self, model_id: str) -> RepertoryError:
        return _shutting_down() if self._closing else Cancelled("it was unloaded while it was loading", model=model_id)

    # Work

    async def _load(self, model_id: str, source: ModelSource, settings: ModelSettings, mark: bytes) -> None:
        old = self._entries.get(model_id)
        if old is not None:
            if old.mark == mark and await self._is_current(old):
                return
            await self._unload(model_id, self._config.grace_s)
        entry = self._entries[model_id] = Entry(model_id, source, settings, mark)
        started_s = time.monotonic()
        limit = asyncio.timeout(self._config.load_timeout_s)
        try:
            async with limit:
                await self._bring(entry, await self._base_of(entry))
        except BaseException as error:
            await self._undo(entry)
            if isinstance(error, TimeoutError) and limit.expired():
                self._entries.pop(model_id, None)
                raise DeadlineExceeded(
                    f"model {model_id!r}: loading took longer than {self._config.load_timeout_s:g} s"
                ) from None
            if not isinstance(error, Exception):
                self._entries.pop(model_id, None)
                raise
            known = (
                error
                if isinstance(error, RepertoryError)
                else EngineFault(f"model {model_id!r}: {type(error).__name__}: {error}")
            )
            self._fail(entry, known)
            log.warning("loading %s failed: %s", model_id, known.message, exc_info=None if known is error else error)
            raise known from None if known is error else error
        entry.load_seconds = time.monotonic() - started_s
        entry.phase = Phase.LOADED
        entry.progress = None
        log.info("loaded %s in %.1f s", model_id, entry.load_seconds)

    async def _is_current(self, entry: Entry) -> bool:
        """Return whether the model is loaded, with the files that its source has now."""
        if entry.phase is not Phase.LOADED or not await is_current(self._preparer, entry.source, entry.prepared):
            return False
        return entry.phase is Phase.LOADED

    async def _base_of(self, entry: Entry) -> Entry | None:
        """Wait until the base of an adapter is loaded, and return it; None for other models. Raises LoadFailed if it is not here."""
        asked = entry.settings.adapter_of
        if asked is None:
            return None
        while True:
            base = self._entries.get(asked) or next((one for one in self._entries.values() if one.name == asked), None)
            if base is None or base.phase not in (*_COMING, Phase.LOADED):
                raise LoadFailed(f"its base {asked} is not loaded here; load it first", model=entry.name)
            if base.settings.adapter_of is not None:
                raise LoadFailed(f"its base {asked} is an adapter itself", model=entry.name)
            if base.phase is Phase.LOADED:
                entry.base_id = base.model_id
                return base
            await self.changes.wait(1.0)

    async def _bring(self, entry: Entry, base: Entry | None) -> None:
        await self._engine.wait_ready()
        loop = asyncio.get_running_loop()
        settings = entry.settings
        self._engine.check_offers(settings.tensor_parallel, entry.name)
        if base is not None:
            assert base.served is not None
            settings = msgspec.structs.replace(settings, dtype=cast("Dtype", base.served.facts.dtype))
        entry.prepared = await self._preparer.prepare(
            entry.source, settings, self._engine.device, lambda progress: _post(loop, self._note, entry, progress)
        )
        load_text = self._load_text if base is None or base.served is None else base.served.text.adapted
        async with self._slots:
            self._note(entry, Progress(Phase.LOADING, text="reading the weights"))
            text = await loop.run_in_executor(
                self._threads, load_text, Path(entry.prepared.checkpoint.model_dir), entry.settings
            )
            facts = await self._admit(entry)
        if note := cut_text(facts.max_model_len, facts.wanted_model_len):
            log.warning("model %s: %s", entry.name, note)
        entry.served = ServedModel(
            entry.model_id,
            entry.name,
            entry.settings,
            facts,
            text,
            loaded_at_s=time.time(),
            base_id=entry.base_id,
            base_name=base.name if base is not None else "",
            root=public_uri(entry.source.uri),
        )

    async def _admit(self, entry: Entry) -> ModelFacts:
        assert entry.prepared is not None
        settings = entry.settings
        checkpoint, max_waiting = entry.prepared.checkpoint, self._config.engine.max_waiting
        request = Load(entry.model_id, checkpoint, settings.max_model_len, max_waiting, entry.base_id)
        while True:
            await self._engine.wait_ready(entry.model_id)
            restarts = self._engine.restarts
            last_used_s = {one.model_id: one.last_used_s for one in self._entries.values()}
            try:
                return await self._engine.load(request, settings.tensor_parallel, last_used_s)
            except Unavailable:
                # The engine crashed: try again until the load's timeout, unless this model is blamed for the crash.
                if self._engine.state is EngineState.STOPPED:
                    raise
                self._refuse_quarantined(entry.model_id, entry.mark)
                if self._engine.restarts == restarts:
                    await self._engine.changes.wait(_UNNOTICED_S)

    async def _return(self, entry: Entry) -> None:
        if entry.phase is not Phase.RETURNING:
            return
        try:
            await self._base_of(entry)
            async with self._slots:
                facts = await self._admit(entry)
        except RepertoryError as error:
            if isinstance(error, Quarantined):
                self._isolate(entry)
                return
            log.warning("%s did not come back: %s", entry.model_id, error.message)
            self._fail(entry, error)
            entry.release()
            return
        assert entry.served is not None
        entry.served = replace(entry.served, facts=facts)
        entry.phase = Phase.LOADED
        log.info("%s is back", entry.model_id)

    async def _unload(self, model_id: str, grace_s: float) -> None:
        entry = self._entries.get(model_id)
        if entry is None:
            return
        if entry.phase is Phase.QUARANTINED:
            if self._quarantine.holds(model_id, entry.mark):
                return
        elif entry.phase is not Phase.FAILED:
            entry.phase = Phase.UNLOADING
            self.changes.notify()
            adapters = [one.model_id for one in self._entries.values() if one.base_id == model_id]
            await asyncio.gather(*(self.unload(adapter_id, grace_s=grace_s) for adapter_id in adapters))
            await self._engine.drain(model_id, grace_s)
            await self._engine.unload(model_id)
        entry.release()
        if self._entries.get(model_id) is entry:
            del self._entries[model_id]
        log.info("unloaded %s", model_id)

    async def _undo(self, entry: Entry) -> None:
        if entry.prepared is not None:
            with contextlib.suppress(RepertoryError):
                await self._engine.unload(entry.model_id)
            entry.release()

    # Bookkeeping

    def _refuse_quarantined(self, model_id: str, mark: bytes) -> None:
        if self._quarantine.holds(model_id, mark):
            raise Quarantined(quarantine_text(model_id))

    def _isolate(self, entry: Entry) -> None:
        entry.phase = Phase.QUARANTINED
        entry.error = quarantine_text(entry.name)
        entry.served = None
        entry.release()
        log.error("%s", entry.error)

    def _fail(self, entry: Entry, error: RepertoryError) -> None:
        entry.phase = Phase.QUARANTINED if isinstance(error, Quarantined) else Phase.FAILED
        entry.error = error.message
        entry.served = None
        entry.progress = None
        failed = [one.model_id for one in self._entries.values() if one.phase is Phase.FAILED]
        for model_id in failed[: max(0, len(failed) - _MAX_FAILURES_SHOWN)]:
            del self._entries[model_id]

    def _note(self, entry: Entry, progress: Progress) -> None:
        if entry.phase in (Phase.PULLING, Phase.PACKING, Phase.LOADING):
            entry.phase = progress.phase
            entry.progress = progress
            self.changes.notify()


def _shutting_down() -> Unavailable:
    return Unavailable("the runtime is shutting down", retry_after_s=1.0)


def _post(
    loop: asyncio.AbstractEventLoop, call: Callable[[Entry, Progress], None], entry: Entry, progress: Progress
) -> None:
    with contextlib.suppress(RuntimeError):  # The loop has closed, so there are no watchers.
        loop.call_soon_threadsafe(call, entry, progress)
