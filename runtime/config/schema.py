"""Defines the runtime's configuration. The front process reads all of it; the engine process receives its `engine` section."""

from typing import Annotated, Any

import msgspec

from common.units import GIB, KIB, MIB


def _about(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the engine process. A size of 0 is chosen from the machine."""

    device: Annotated[str, _about("device: auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    device_budget_bytes: Annotated[
        int,
        _about(
            "device memory for the weights and KV cache of all models; 0 = free device memory less the reserve (CPU: half of free memory)",
            ge=0,
        ),
    ] = 0
    device_reserve_bytes: Annotated[
        int, _about("GPU memory kept free for the context, cuBLAS, graph pools, activations and the packer", ge=0)
    ] = 6 * GIB
    host_budget_bytes: Annotated[
        int, _about("pinned host memory for evicted models; 0 = half of free memory (GPU only)", ge=0)
    ] = 0
    host_kv_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        _about(
            "the most host memory for cached KV whose device memory was reclaimed; empty = a quarter of the host budget (CPU: 0), 0 = it is dropped"
        ),
    ] = None
    slab_bytes: Annotated[int, _about("size of a slab of device memory; 0 = 64 MiB on a GPU, 4 MiB on a CPU", ge=0)] = 0
    host_arena_path: Annotated[
        str, _about("shared memory file of the host arena, which outlives an engine crash; empty = private memory")
    ] = ""
    tensor_parallel: Annotated[
        int,
        _about(
            "number of devices in each group, which share a model; on a CPU the number of processes of the one group",
            gt=0,
            le=64,
        ),
    ] = 1
    host_sharers: Annotated[
        int, _about("devices of the runtime, among which free host memory is divided; the runtime sets it", gt=0)
    ] = 1
    shares_device: Annotated[
        bool,
        _about("other engines use the same devices, so slabs are taken and given back one by one; the runtime sets it"),
    ] = False
    block_tokens: Annotated[int, _about("tokens per KV block", gt=0)] = 16
    max_rows: Annotated[int, _about("largest number of running sequences over all models", gt=0)] = 512
    max_batch_tokens: Annotated[int, _about("token budget of a step", gt=0)] = 8192
    quantum_us: Annotated[
        int, _about("time budget of a step, in microseconds, while several models have work", gt=0)
    ] = 20_000
    max_waiting: Annotated[int, _about("largest number of waiting sequences per model", gt=0)] = 4096
    max_adapters: Annotated[
        int, _about("largest number of LoRA adapters of one base on the device at once, and in one step", gt=0, le=1024)
    ] = 64
    max_adapter_rank: Annotated[int, _about("largest rank of a LoRA adapter", gt=0, le=512)] = 256
    wait_budget_s: Annotated[
        float,
        _about("longest time that a model's requests wait while it runs none, because others hold the device", gt=0),
    ] = 120.0
    kv_dtype: Annotated[str, _about("KV cache data type: auto (the model's) or fp8", pattern=r"^(auto|fp8)$")] = "auto"
    graphs: Annotated[bool, _about("capture CUDA graphs")] = True
    fuse: Annotated[bool, _about("use fused layers where the architecture allows it")] = True
    debug_checks: Annotated[bool, _about("assert free + lent = total after every step")] = False
    num_threads: Annotated[int, _about("number of torch threads on a CPU; 0 = torch's default", ge=0)] = 0
    oversubscribe: Annotated[
        str,
        _about(
            "where loaded models without device memory are kept: none, host or disk; auto = host on a GPU, none on a CPU",
            pattern=r"^(auto|none|host|disk)$",
        ),
    ] = "auto"


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of `repertory serve-runtime`."""

    listen: Annotated[tuple[str, ...], _about("gRPC addresses: unix:PATH or HOST:PORT")] = (
        "unix:/tmp/repertory/runtime.sock",
    )
    http_listen: Annotated[str, _about("HTTP address (OpenAI API, health and metrics): unix:PATH or HOST:PORT")] = (
        "unix:/tmp/repertory/runtime-http.sock"
    )
    remote_mesh: Annotated[
        bool,
        _about(
            "accept mmesh.ModelRuntime and repertory.RuntimeState from other machines; anyone there can then unload models"
        ),
    ] = False
    gpu_groups: Annotated[
        str,
        _about(
            "GPUs (CPU: processes) of each group, such as 2,1,1; after a +, further groups of the same ones, as in 1,1+2; empty = all",
            pattern=r"^([0-9]+(,[0-9]+)*(\+[0-9]+(,[0-9]+)*)*)?$",
        ),
    ] = ""
    cache_dir: Annotated[str, _about("directory of pulled and packed files; empty = $XDG_CACHE_HOME/repertory")] = ""
    cache_budget_bytes: Annotated[
        int, _about("disk budget of the cache; 0 = 80 % of the free disk space at start", ge=0)
    ] = 0
    model_roots: Annotated[
        tuple[str, ...],
        _about(
            "directories that may contain models given by path, file:// or symbolic link; empty = local paths are refused"
        ),
    ] = ()
    source_hosts: Annotated[
        tuple[str, ...],
        _about(
            "hosts outside the public internet that models may be fetched from: names, addresses, networks such as 10.0.0.0/8, or * for any"
        ),
    ] = ()
    storage_config_dir: Annotated[
        str, _about("directory of storage credentials, one JSON file per key (ModelMesh's storage-config secret)")
    ] = ""
    pvc_dir: Annotated[str, _about("directory in which pvc:// volumes are mounted")] = "/pvc_mounts"
    allow_pickle: Annotated[bool, _about("read .bin and .pt checkpoints (weights only)")] = False
    allow_remote_code: Annotated[bool, _about("accept checkpoints that contain code; the code is never run")] = False
    max_loading_concurrency: Annotated[int, _about("largest number of concurrent loads, not counting pulls", gt=0)] = 2
    max_pulling_concurrency: Annotated[int, _about("largest number of models that are pulled concurrently", gt=0)] = 8
    pull_min_rate_bytes: Annotated[
        int, _about("bytes per second below which a pull fails, averaged over a minute; 0 = no limit", ge=0)
    ] = 16 * KIB
    engine_silence_s: Annotated[
        float,
        _about(
            "time without a message after which a busy engine is restarted; 0 = 300 on a GPU, never on a CPU; negative = never"
        ),
    ] = 0.0
    load_timeout_s: Annotated[
        float, _about("time limit of one load, from pull to ready; ModelMesh derives its churn guard from it", gt=0)
    ] = 600.0
    max_new_tokens: Annotated[
        int, _about("TGIS: largest number of new tokens per request, and upper bound of the default", gt=0)
    ] = 4096
    default_include_stop_seqs: Annotated[bool, _about("TGIS: include stop sequences in the text by default")] = True
    output_special_tokens: Annotated[bool, _about("TGIS: include special tokens in the text")] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        _about("further host names of this server in requests of browsers and, on loopback, of any program; * = any"),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        _about("origins such as https://chat.example whose web pages may call this server; * = any"),
    ] = ()
    grpc_max_message_bytes: Annotated[int, _about("largest gRPC message", gt=0)] = 16 * MIB
    http_max_body_bytes: Annotated[int, _about("largest HTTP request body", gt=0)] = 8 * MIB
    grace_s: Annotated[
        float,
        _about("time that running requests have to finish after SIGTERM, or before their model is unloaded", ge=0),
    ] = 30.0
    log_json: Annotated[bool, _about("write logs as JSON lines")] = False
    log_level: Annotated[
        str,
        _about(
            "lowest level that is logged: debug, info, warning or error", pattern=r"^(?i:debug|info|warning|error)$"
        ),
    ] = "info"
    engine: Annotated[EngineConfig, _about("settings of the engine process (next table)")] = EngineConfig()
