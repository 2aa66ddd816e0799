from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STARTING: _ClassVar[EngineState]
    ENGINE_READY: _ClassVar[EngineState]
    ENGINE_RESTARTING: _ClassVar[EngineState]
    ENGINE_STOPPED: _ClassVar[EngineState]
ENGINE_STARTING: EngineState
ENGINE_READY: EngineState
ENGINE_RESTARTING: EngineState
ENGINE_STOPPED: EngineState

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RuntimeSnapshot(_message.Message):
    __slots__ = ("device_budget_bytes", "device_used_bytes", "host_budget_bytes", "host_used_bytes", "capacity_bytes", "stranded_bytes", "engine_state", "engine_restarts", "device_name", "models", "device_reserve_bytes", "devices")
    DEVICE_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STRANDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STATE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_RESERVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    device_budget_bytes: int
    device_used_bytes: int
    host_budget_bytes: int
    host_used_bytes: int
    capacity_bytes: int
    stranded_bytes: int
    engine_state: EngineState
    engine_restarts: int
    device_name: str
    models: _containers.RepeatedCompositeFieldContainer[ModelState]
    device_reserve_bytes: int
    devices: _containers.RepeatedCompositeFieldContainer[DeviceState]
    def __init__(self, device_budget_bytes: _Optional[int] = ..., device_used_bytes: _Optional[int] = ..., host_budget_bytes: _Optional[int] = ..., host_used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., stranded_bytes: _Optional[int] = ..., engine_state: _Optional[_Union[EngineState, str]] = ..., engine_restarts: _Optional[int] = ..., device_name: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelState, _Mapping]]] = ..., device_reserve_bytes: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[DeviceState, _Mapping]]] = ...) -> None: ...

class DeviceState(_message.Message):
    __slots__ = ("name", "group", "budget_bytes", "used_bytes", "engine_state")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    group: str
    budget_bytes: int
    used_bytes: int
    engine_state: EngineState
    def __init__(self, name: _Optional[str] = ..., group: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., engine_state: _Optional[_Union[EngineState, str]] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model_id", "state", "tier", "progress", "progress_bytes", "total_bytes", "progress_text", "weight_bytes", "device_bytes", "kv_bytes", "kv_used_tokens", "kv_cached_tokens", "running", "waiting", "swap_in_s", "load_s", "quantization", "dtype", "architecture", "path", "max_model_len", "tokens_per_s", "error", "kv_usage", "prompt_tokens_total", "generated_tokens_total", "prefix_hit_tokens_total", "preemptions_total", "steps_total", "step_seconds_total", "evictions_total", "swap_ins_total", "wanted_model_len", "busy_s", "kv_host_bytes", "kv_saved_blocks_total", "kv_restored_blocks_total", "kv_dropped_blocks_total", "devices")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PULLING: _ClassVar[ModelState.State]
        PACKING: _ClassVar[ModelState.State]
        LOADING: _ClassVar[ModelState.State]
        LOADED: _ClassVar[ModelState.State]
        FAILED: _ClassVar[ModelState.State]
        QUARANTINED: _ClassVar[ModelState.State]
    PULLING: ModelState.State
    PACKING: ModelState.State
    LOADING: ModelState.State
    LOADED: ModelState.State
    FAILED: ModelState.State
    QUARANTINED: ModelState.State
    class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REMOTE: _ClassVar[ModelState.Tier]
        DISK: _ClassVar[ModelState.Tier]
        HOST: _ClassVar[ModelState.Tier]
        DEVICE: _ClassVar[ModelState.Tier]
    REMOTE: ModelState.Tier
    DISK: ModelState.Tier
    HOST: ModelState.Tier
    DEVICE: ModelState.Tier
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_TEXT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SWAP_IN_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SWAP_INS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WANTED_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    KV_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SAVED_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_RESTORED_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_DROPPED_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    state: ModelState.State
    tier: ModelState.Tier
    progress: float
    progress_bytes: int
    total_bytes: int
    progress_text: str
    weight_bytes: int
    device_bytes: int
    kv_bytes: int
    kv_used_tokens: int
    kv_cached_tokens: int
    running: int
    waiting: int
    swap_in_s: float
    load_s: float
    quantization: str
    dtype: str
    architecture: str
    path: str
    max_model_len: int
    tokens_per_s: float
    error: str
    kv_usage: float
    prompt_tokens_total: int
    generated_tokens_total: int
    prefix_hit_tokens_total: int
    preemptions_total: int
    steps_total: int
    step_seconds_total: float
    evictions_total: int
    swap_ins_total: int
    wanted_model_len: int
    busy_s: float
    kv_host_bytes: int
    kv_saved_blocks_total: int
    kv_restored_blocks_total: int
    kv_dropped_blocks_total: int
    devices: str
    def __init__(self, model_id: _Optional[str] = ..., state: _Optional[_Union[ModelState.State, str]] = ..., tier: _Optional[_Union[ModelState.Tier, str]] = ..., progress: _Optional[float] = ..., progress_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., progress_text: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., kv_cached_tokens: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., swap_in_s: _Optional[float] = ..., load_s: _Optional[float] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., architecture: _Optional[str] = ..., path: _Optional[str] = ..., max_model_len: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., error: _Optional[str] = ..., kv_usage: _Optional[float] = ..., prompt_tokens_total: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., prefix_hit_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., steps_total: _Optional[int] = ..., step_seconds_total: _Optional[float] = ..., evictions_total: _Optional[int] = ..., swap_ins_total: _Optional[int] = ..., wanted_model_len: _Optional[int] = ..., busy_s: _Optional[float] = ..., kv_host_bytes: _Optional[int] = ..., kv_saved_blocks_total: _Optional[int] = ..., kv_restored_blocks_total: _Optional[int] = ..., kv_dropped_blocks_total: _Optional[int] = ..., devices: _Optional[str] = ...) -> None: ...

class FitRequest(_message.Message):
    __slots__ = ("model_id", "model_path", "model_key", "sizes_only")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_KEY_FIELD_NUMBER: _ClassVar[int]
    SIZES_ONLY_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_path: str
    model_key: str
    sizes_only: bool
    def __init__(self, model_id: _Optional[str] = ..., model_path: _Optional[str] = ..., model_key: _Optional[str] = ..., sizes_only: bool = ...) -> None: ...

class FitResponse(_message.Message):
    __slots__ = ("weight_bytes", "kv_bytes_per_token", "min_kv_bytes", "workspace_bytes", "capacity_bytes", "fits", "reason", "evicts", "max_model_len", "quantization", "architecture", "num_parameters", "exact", "wanted_model_len", "unpacked_blocks", "stored_bytes", "nf4_weight_bytes", "num_devices", "kept_weight_bytes")
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MIN_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVICTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    WANTED_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    UNPACKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NF4_WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    KEPT_WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    weight_bytes: int
    kv_bytes_per_token: int
    min_kv_bytes: int
    workspace_bytes: int
    capacity_bytes: int
    fits: bool
    reason: str
    evicts: _containers.RepeatedScalarFieldContainer[str]
    max_model_len: int
    quantization: str
    architecture: str
    num_parameters: int
    exact: bool
    wanted_model_len: int
    unpacked_blocks: str
    stored_bytes: int
    nf4_weight_bytes: int
    num_devices: int
    kept_weight_bytes: int
    def __init__(self, weight_bytes: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., min_kv_bytes: _Optional[int] = ..., workspace_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., fits: bool = ..., reason: _Optional[str] = ..., evicts: _Optional[_Iterable[str]] = ..., max_model_len: _Optional[int] = ..., quantization: _Optional[str] = ..., architecture: _Optional[str] = ..., num_parameters: _Optional[int] = ..., exact: bool = ..., wanted_model_len: _Optional[int] = ..., unpacked_blocks: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., nf4_weight_bytes: _Optional[int] = ..., num_devices: _Optional[int] = ..., kept_weight_bytes: _Optional[int] = ...) -> None: ...

class ListFilesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CachedFiles(_message.Message):
    __slots__ = ("key", "kind", "uri", "size_bytes", "last_used_ms", "in_use")
    KEY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_MS_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    key: str
    kind: str
    uri: str
    size_bytes: int
    last_used_ms: int
    in_use: bool
    def __init__(self, key: _Optional[str] = ..., kind: _Optional[str] = ..., uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., last_used_ms: _Optional[int] = ..., in_use: bool = ...) -> None: ...

class ListFilesResponse(_message.Message):
    __slots__ = ("files", "budget_bytes")
    FILES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[CachedFiles]
    budget_bytes: int
    def __init__(self, files: _Optional[_Iterable[_Union[CachedFiles, _Mapping]]] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class DropFilesRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[str]] = ...) -> None: ...

class DropFilesResponse(_message.Message):
    __slots__ = ("freed_bytes", "num_in_use")
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_USE_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    num_in_use: int
    def __init__(self, freed_bytes: _Optional[int] = ..., num_in_use: _Optional[int] = ...) -> None: ...
