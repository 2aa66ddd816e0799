"""The runtime's configuration: one typed tree, given whole to the front process and its engine part to the engine process.

Knows defaults and ranges; where a value comes from (flag, environment, file) is `__main__`'s business.
"""

import msgspec

GIB = 1024**3
MIB = 1024**2


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is told at its start. Sizes in bytes, 0 = choose from the machine."""

    device: str = "auto"                    # auto | cpu | cuda | cuda:N
    device_budget_bytes: int = 0            # weights and KV of all models; 0 = free device memory less the reserve (CPU: half of free memory)
    device_reserve_bytes: int = 6 * GIB     # on a GPU: context, cuBLAS, graph pools, activations, the packer
    host_budget_bytes: int = 0              # pinned arena; 0 = half of free memory (GPU); the CPU has none
    slab_bytes: int = 0                     # 0 = 64 MiB on a GPU, 4 MiB on a CPU
    host_arena_path: str = ""               # shared memory that outlives the engine; "" = private
    block_tokens: int = 16
    max_rows: int = 512                     # running sequences, over all models
    max_batch_tokens: int = 8192            # a step's token budget
    quantum_us: int = 20_000                # a step's time budget when several models have work
    max_waiting: int = 4096                 # queued sequences a model
    kv_dtype: str = "auto"                  # auto | fp8
    graphs: bool = True                     # CUDA graphs
    fuse: bool = True
    debug_checks: bool = False              # assert free + lent = total after every step
    num_threads: int = 0                    # torch threads on a CPU; 0 = torch's choice
    oversubscribe: str = "auto"             # none | host | disk; auto = host on a GPU, none on a CPU


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the front process is told."""

    listen: tuple[str, ...] = ("unix:/tmp/repertory/runtime.sock",)   # gRPC: unix:PATH or HOST:PORT
    http_listen: str = "unix:/tmp/repertory/runtime-http.sock"       # OpenAI and health: unix:PATH or HOST:PORT
    cache_dir: str = ""                     # pulled and packed files; "" = $XDG_CACHE_HOME/repertory
    cache_budget_bytes: int = 0             # 0 = 80 % of the disk's free space at start
    model_roots: tuple[str, ...] = ()       # plain paths and file:// must lie below one of these; () = anywhere readable
    storage_config_dir: str = ""            # ModelMesh's storage-config secret, one JSON file a key
    pvc_dir: str = "/pvc_mounts"
    allow_pickle: bool = False
    allow_remote_code: bool = False
    max_loading_concurrency: int = 2
    load_timeout_s: float = 3600.0
    max_new_tokens: int = 4096              # TGIS: server limit and ceiling of a default
    default_include_stop_seqs: bool = True
    output_special_tokens: bool = False
    grpc_max_message_bytes: int = 16 * MIB
    http_max_body_bytes: int = 8 * MIB
    grace_s: float = 30.0
    log_json: bool = False
    log_level: str = "info"
    engine: EngineConfig = EngineConfig()
