"""Data types and Protocols that the mesh's packages share: models, copies, targets, the runtime's state and its client.

Times are epoch milliseconds where ModelMesh's records hold them (`…_ms`), and seconds elsewhere (`…_s`).
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from common.model_fit import ModelFit
from common.model_state import CopyState, DeviceFigures, ModelState, Tier


class ModelStatus(IntEnum):
    """ModelMesh's ModelStatusInfo.ModelStatus, number for number."""

    NOT_FOUND = 0
    NOT_LOADED = 1
    LOADING = 2
    LOADED = 3
    LOADING_FAILED = 4
    UNKNOWN = 5


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's attributes as registered; immutable. `key` is ModelMesh's model key (JSON text: storage and per-model settings)."""

    type: str
    path: str
    key: str = ""


_UNKNOWN = ModelState(state=CopyState.UNKNOWN, tier=Tier.UNKNOWN)


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """One pod's copy of a model as this pod knows it. `model` is the state that the copy's own pod reports."""

    instance_id: str
    status: ModelStatus
    time_ms: int
    model: ModelState = _UNKNOWN


@dataclass(frozen=True, slots=True)
class StatusInfo:
    """A model's state over all pods; `errors` newest first, `copies` newest first."""

    status: ModelStatus
    errors: tuple[str, ...] = ()
    copies: tuple[CopyInfo, ...] = ()


class ModelStatuses(Protocol):
    """What this pod knows of the models' states, without a remote call."""

    def status(self, model_id: str) -> StatusInfo:
        """Return the model's state over all pods."""
        ...

    def blocked_for_s(self, model_id: str) -> float:
        """Return the seconds until a pod may try to load a failed model again; 0 if one may now."""
        ...


class Loader(Protocol):
    """Placement, as the management API, moving names and static models use it."""

    async def ensure_loaded(self, model_id: str, *, last_used_ms: int = 0, wait: bool = False) -> StatusInfo:
        """Start a load unless a copy is loaded or loading. `last_used_ms` 0 means now.

        With `wait`, returns when the model is LOADED or LOADING_FAILED. Cancelling the call does not stop the load.
        Raises NotFound for an unknown model.
        """

    async def unload(self, model_id: str) -> None:
        """Unload all copies and return when they are gone. The registration stays. Unknown and unloaded models are ignored."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: a local runtime, a peer pod one hop away, or, for a worker, the pod's control process (`is_control`)."""

    instance_id: str
    local: bool
    grpc_address: str
    http_address: str  # "unix:PATH" or "HOST:PORT"
    generation: int = 0  # which load of a local copy this is: a late "not found" about an earlier one means nothing
    is_loaded: bool = True  # False: the copy is loading, and its pod holds the request until it is loaded
    is_control: bool = False

    @property
    def is_peer(self) -> bool:
        return not self.local and not self.is_control


@dataclass(frozen=True, slots=True)
class RuntimeSnapshot:
    """The local runtime's state. A `foreign` runtime has no repertory.RuntimeState, so only its capacity and readiness are known."""

    capacity_bytes: int
    ready: bool = False
    foreign: bool = False
    device_budget_bytes: int = 0
    device_used_bytes: int = 0
    device_reserve_bytes: int = 0
    host_budget_bytes: int = 0
    host_used_bytes: int = 0
    engine_state: str = ""
    engine_restarts: int = 0
    device_name: str = ""
    models: tuple[ModelState, ...] = ()
    devices: tuple[DeviceFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class RuntimeLimits:
    """The answer of mmesh.ModelRuntime/runtimeStatus when the runtime became ready."""

    capacity_bytes: int
    max_loading_concurrency: int
    model_loading_timeout_s: float
    default_model_size_bytes: int
    version: str = ""
    allowed_methods: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # full method → id injection path; empty = any method
    allow_any_method: bool = True
    limit_model_concurrency: bool = False


@dataclass(frozen=True, slots=True)
class LoadAnswer:
    """The report of a runtime on a model that it has loaded.

    `size_bytes` is 0 if the runtime does not know it. `max_concurrency` limits concurrent requests to the copy; 0 means no limit.
    `sizing_s`: how long a separate question for the size took; 0 if there was none.
    """

    size_bytes: int
    max_concurrency: int = 0
    sizing_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class CachedFiles:
    """An entry of a runtime's disk cache. `kind` is pulled, packed or partial; `uri` is its source, empty if unknown."""

    key: str
    kind: str
    uri: str
    size_bytes: int
    last_used_ms: int
    in_use: bool


class RuntimeClient(Protocol):
    """The local runtime, as placement sees it."""

    async def wait_ready(self, timeout_s: float) -> RuntimeLimits: ...

    async def load(self, model_id: str, info: ModelInfo, timeout_s: float) -> LoadAnswer:
        """Load a model. A cancelled load leaves nothing behind.

        Raises LoadFailed (also for a model that can never fit), Overloaded (no space now: unloading another model may help)
        or Unavailable (the runtime is restarting).
        """

    async def unload(self, model_id: str, *, allow_retry: bool = False) -> None:
        """Idempotent. A quarantine ends only with `allow_retry`: an eviction or the end of a failed load may cross with it."""

    async def undo_load(self, model_id: str) -> None:
        """Unload a model that is not kept. The unload continues if this call is cancelled."""

    async def predict_size(self, model_id: str, info: ModelInfo) -> int | None: ...

    async def fit(self, model_id: str, info: ModelInfo, *, sizes_only: bool = False) -> ModelFit:
        """Estimate a load. Unless `sizes_only`, check that the engine can run the model, which may take seconds."""

    async def list_files(self) -> tuple[int, list[CachedFiles]]:
        """Return the disk cache's budget in bytes, and what it holds. Raises NotSupported for a foreign runtime, Unavailable."""

    async def drop_files(self, keys: Sequence[str]) -> tuple[int, int]:
        """Drop entries of the disk cache. Return the bytes that were freed, and how many entries are in use and stay."""

    async def look(self) -> RuntimeSnapshot | None:
        """Return the runtime's current state, or None if it does not answer or has no repertory.RuntimeState."""

    def watch(self) -> AsyncIterator[RuntimeSnapshot]:
        """Yield the runtime's snapshots and reconnect as needed. The first snapshot of a restarted runtime has no models."""
