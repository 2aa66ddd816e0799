"""Registers and removes models by name for the HTTP routes, after checking with the runtime that their settings are possible."""

import asyncio
import logging
from dataclasses import dataclass

from common.clock import epoch_ms
from common.model_fit import ModelFit
from mesh.access.caller import current_caller
from mesh.errors import InvalidRequest, MeshError, NotFound
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import Placement
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.registration import base_of
from mesh.registry.registry import Registry
from mesh.types import ModelInfo, ModelStatus, RuntimeClient

logger = logging.getLogger(__name__)

_CHECK_S = 3.0  # the longest time that a registration waits for the source


@dataclass(frozen=True, slots=True)
class Registration:
    """A registered name's concrete id, and what the model needs, None if the runtime did not answer in time."""

    model_id: str
    fit: ModelFit | None


class Registrar:
    def __init__(
        self,
        registry: Registry,
        placement: Placement,
        states: ModelStates,
        monitor: RuntimeMonitor,
        runtime: RuntimeClient,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._states = states
        self._monitor = monitor
        self._runtime = runtime

    async def register(self, name: str, info: ModelInfo, *, load: bool) -> Registration:
        """Register a name, and begin to load it if asked to. Raises InvalidRequest, AlreadyExists."""
        await self.check_base(info)
        fit = await self.fit_of(info)
        model_id = await self._registry.register_name(name, info, now_ms=epoch_ms(), is_loaded=self.is_loaded)
        if load:
            await self._placement.ensure_loaded(model_id, retry_failed=True)
        return Registration(model_id, fit)

    async def remove(self, name: str) -> str:
        """Remove a name and return its concrete id, after the copies are unloaded too. Raises NotFound, PreconditionFailed."""
        model_id = await self._registry.resolve_fresh(name)
        await self._registry.remove_name(name)
        if self._registry.models.get(model_id) is None:
            await self._placement.unload(model_id)
        return model_id

    async def check_base(self, info: ModelInfo) -> None:
        """Raise InvalidRequest for an adapter whose base is not registered, or is an adapter itself."""
        name = base_of(info)
        if name:
            current_caller().check_model(name)
        try:
            base = await self._registry.base_of(info)
        except NotFound:
            raise InvalidRequest(f"adapter_of: {name!r} is not registered; register the base first") from None
        if base is not None and base_of(base[1]):
            raise InvalidRequest(f"adapter_of: {name!r} is an adapter itself; its base is {base_of(base[1])!r}")

    def is_loaded(self, model_id: str) -> bool:
        return self._states.status(model_id).status is ModelStatus.LOADED

    async def fit_of(self, info: ModelInfo) -> ModelFit | None:
        """Return what the model needs, None if the runtime cannot say so within a few seconds. Raises InvalidRequest for settings that it refuses.

        Missing files and a full memory do not count: they may change until the model is loaded.
        """
        if not self._monitor.snapshot.ready or self._monitor.snapshot.foreign:
            return None
        try:
            async with asyncio.timeout(_CHECK_S):
                return await self._runtime.fit("", info, sizes_only=True)
        except InvalidRequest:
            raise
        except (MeshError, TimeoutError) as error:
            logger.debug("model %s is registered unchecked: %s", info.path, error)
            return None
