"""The runtime's configuration: one typed tree. The front process receives all of it, the engine process its engine section."""

from typing import Annotated, Any

import msgspec

from common.units import GIB, MIB


def _about(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is told at its start. Sizes in bytes, 0 = choose from the machine."""

    device: Annotated[str, _about("auto | cpu | cuda | cuda:N", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    device_budget_bytes: Annotated[
        int,
        _about(
            "weights and KV of all models; 0 = free device memory less the reserve (CPU: half of free memory)", ge=0
        ),
    ] = 0
    device_reserve_bytes: Annotated[
        int, _about("on a GPU: context, cuBLAS, graph pools, activations, the packer", ge=0)
    ] = 6 * GIB
    host_budget_bytes: Annotated[int, _about("pinned arena; 0 = half of free memory (GPU); the CPU has none", ge=0)] = 0
    slab_bytes: Annotated[int, _about("0 = 64 MiB on a GPU, 4 MiB on a CPU", ge=0)] = 0
    host_arena_path: Annotated[str, _about("shared memory that outlives the engine; empty = private")] = ""
    block_tokens: Annotated[int, _about("tokens in a KV block", gt=0)] = 16
    max_rows: Annotated[int, _about("running sequences, over all models", gt=0)] = 512
    max_batch_tokens: Annotated[int, _about("a step's token budget", gt=0)] = 8192
    quantum_us: Annotated[int, _about("a step's time budget when several models have work", gt=0)] = 20_000
    max_waiting: Annotated[int, _about("queued sequences a model", gt=0)] = 4096
    kv_dtype: Annotated[str, _about("auto | fp8", pattern=r"^(auto|fp8)$")] = "auto"
    graphs: Annotated[bool, _about("CUDA graphs")] = True
    fuse: Annotated[bool, _about("join layers where a family's structure allows it")] = True
    debug_checks: Annotated[bool, _about("assert free + lent = total after every step")] = False
    num_threads: Annotated[int, _about("torch threads on a CPU; 0 = torch's choice", ge=0)] = 0
    oversubscribe: Annotated[
        str, _about("none | host | disk; auto = host on a GPU, none on a CPU", pattern=r"^(auto|none|host|disk)$")
    ] = "auto"


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the front process is told."""

    listen: Annotated[tuple[str, ...], _about("gRPC addresses: unix:PATH or HOST:PORT")] = (
        "unix:/tmp/repertory/runtime.sock",
    )
    http_listen: Annotated[str, _about("OpenAI API, health and metrics: unix:PATH or HOST:PORT")] = (
        "unix:/tmp/repertory/runtime-http.sock"
    )
    cache_dir: Annotated[str, _about("pulled and packed files; empty = $XDG_CACHE_HOME/repertory")] = ""
    cache_budget_bytes: Annotated[int, _about("0 = 80 % of the disk's free space at start", ge=0)] = 0
    model_roots: Annotated[
        tuple[str, ...], _about("plain paths, file:// and links must lie below one of these; none = anywhere readable")
    ] = ()
    storage_config_dir: Annotated[str, _about("ModelMesh's storage-config secret, one JSON file a key")] = ""
    pvc_dir: Annotated[str, _about("where pvc:// volumes are mounted")] = "/pvc_mounts"
    allow_pickle: Annotated[bool, _about("read .bin and .pt checkpoints (weights only)")] = False
    allow_remote_code: Annotated[bool, _about("take checkpoints that bring code; the code itself is never run")] = False
    max_loading_concurrency: Annotated[int, _about("loads beside each other", gt=0)] = 2
    engine_silence_s: Annotated[
        float,
        _about(
            "an engine with work to do that tells nothing for so long hangs, and is restarted; 0 = 300 on a GPU, never on a CPU; negative = never"
        ),
    ] = 0.0
    load_timeout_s: Annotated[float, _about("one load, from pull to ready", gt=0)] = 3600.0
    max_new_tokens: Annotated[int, _about("TGIS: server limit and ceiling of a default", gt=0)] = 4096
    default_include_stop_seqs: Annotated[bool, _about("TGIS: stop sequences are part of the text")] = True
    output_special_tokens: Annotated[bool, _about("TGIS: special tokens are part of the text")] = False
    grpc_max_message_bytes: Annotated[int, _about("one gRPC message", gt=0)] = 16 * MIB
    http_max_body_bytes: Annotated[int, _about("one HTTP body", gt=0)] = 8 * MIB
    grace_s: Annotated[
        float, _about("on SIGTERM, and when a model is unloaded: running answers may take this long", ge=0)
    ] = 30.0
    log_json: Annotated[bool, _about("logs as JSON lines")] = False
    log_level: Annotated[str, _about("debug, info, warning or error", pattern=r"^(?i:debug|info|warning|error)$")] = (
        "info"
    )
    engine: Annotated[EngineConfig, _about("the engine process's part: the next table")] = EngineConfig()
