"""The state of a model's copy, defined once from the engine's figures to the registry, the HTTP API and the command line.

The engine fills `ModelFigures`, the runtime completes them to a `ModelState`, and `proto/repertory/runtime.proto` carries that under the same
names. To add a figure, add a field here and to the proto message, and fill it in the engine.
"""

from enum import StrEnum

import msgspec


class Tier(StrEnum):
    """The nearest place that holds all weights of a loaded model."""

    UNKNOWN = ""  # not loaded, or a runtime without repertory.RuntimeState
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class CopyState(StrEnum):
    """The state of one pod's copy, finer than ModelMesh's status."""

    UNKNOWN = ""  # a copy of a pod that does not report states
    QUEUED = "queued"
    PULLING = "pulling"
    PACKING = "packing"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device of a pod. `group`: the first device of its group; a model is shared by all devices of one group."""

    name: str = ""
    group: str = ""
    budget_bytes: int = 0
    used_bytes: int = 0


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The engine's figures of one model. Counters (`…_total`) start at zero with each engine process."""

    model_id: str = ""
    tier: Tier = Tier.DEVICE
    weight_bytes: int = 0
    device_bytes: int = 0  # weights and KV in device memory, in whole slabs
    kv_bytes: int = 0  # KV in device memory, in whole slabs
    kv_used_tokens: int = 0  # of running sequences
    kv_cached_tokens: int = 0  # of ended sequences, kept for their prefixes
    kv_host_bytes: int = 0  # saved KV in host memory, in whole slabs
    kv_usage: float = 0.0  # 0 to 1: KV of running sequences over the KV that the model could have without a preemption
    running: int = 0  # sequences
    waiting: int = 0
    busy_s: float = 0.0  # expected time until the running sequences have ended; 0 if none runs
    swap_in_s: float = 0.0  # expected time to bring the weights to the device; 0 if they are there
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    evictions_total: int = 0
    swap_ins_total: int = 0
    kv_saved_blocks_total: int = 0  # copied to host memory before their device memory was reclaimed
    kv_restored_blocks_total: int = 0  # copied back for a request
    kv_dropped_blocks_total: int = 0  # copies in host memory that gave way or became invalid


class ModelState(ModelFigures, frozen=True, kw_only=True, omit_defaults=True):
    """One copy of a model as its runtime reports it. The defaults are those of the common case, a loaded model on the device."""

    state: CopyState = CopyState.LOADED
    progress: float = 0.0  # 0 to 1 of pulling, packing or loading
    progress_bytes: int = 0
    total_bytes: int = 0  # 0 if unknown
    progress_text: str = ""
    load_s: float = 0.0  # duration of the last load; 0 if there was none
    tokens_per_s: float = 0.0  # generated, over the last seconds
    quantization: str = ""
    dtype: str = ""
    architecture: str = ""
    path: str = ""  # fused or unfused forward pass, with the reason
    max_model_len: int = 0  # tokens
    wanted_model_len: int = 0  # tokens: max_model_len before it was cut to what the device budget holds
    error: str = ""  # why the model failed or is quarantined
    devices: str = ""  # those that hold the model, such as cuda:0,cuda:1; sizes are those on all of them

    def settled(self) -> "ModelState":
        """Return the state without the figures that change with every request or chunk of a download."""
        return ModelState(**{name: getattr(self, name) for name in _SETTLED})


_SETTLED = (
    "model_id",
    "tier",
    "weight_bytes",
    "state",
    "load_s",
    "quantization",
    "dtype",
    "architecture",
    "path",
    "max_model_len",
    "wanted_model_len",
    "error",
    "devices",
)
