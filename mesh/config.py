"""The configuration of one pod's mesh. common/config.py merges its sources."""

from typing import Annotated, Any

import msgspec

from common.units import MIB


def _about(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


class MeshConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds, addresses `HOST:PORT` or `unix:PATH`."""

    grpc_listen: Annotated[str, _about("gRPC: management, inference by model name")] = "127.0.0.1:8033"
    http_listen: Annotated[str, _about("OpenAI API, admin, health and metrics")] = "127.0.0.1:8080"
    advertise_host: Annotated[str, _about("the address at which other pods reach this one; empty = found out")] = ""
    instance_id: Annotated[str, _about("this pod's name; empty = made up from the host's")] = ""
    service_name: Annotated[str, _about("pods that share a store and this name form one mesh")] = "repertory"
    store: Annotated[
        str, _about("embedded:DIR, etcd://HOST:PORT[,…][/PREFIX] or etcd:FILE.json (ModelMesh's KV_STORE)")
    ] = ""
    kv_prefix: Annotated[str, _about("ModelMesh's MM_KVSTORE_PREFIX")] = "mm"
    runtime_grpc: Annotated[str, _about("the runtime that this pod fronts: its gRPC address")] = (
        "unix:/tmp/repertory/runtime.sock"
    )
    runtime_http: Annotated[str, _about("its HTTP address; empty for a runtime that has none")] = (
        "unix:/tmp/repertory/runtime-http.sock"
    )
    wait_budget_s: Annotated[float, _about("how long a request may wait for its model to be loaded", ge=0)] = 120.0
    keep_alive_s: Annotated[float, _about("silence after which a waiting stream gets a comment", gt=0)] = 5.0
    max_held: Annotated[int, _about("requests that may wait for one model to be loaded", ge=0)] = 1024
    api_keys: Annotated[
        tuple[str, ...], _about("bearer keys, any of which opens every route but health; none = open")
    ] = ()
    grpc_max_message_bytes: Annotated[int, _about("one gRPC message", gt=0)] = 16 * MIB
    http_max_body_bytes: Annotated[int, _about("one HTTP body", gt=0)] = 8 * MIB
    session_ttl_s: Annotated[float, _about("a pod that is silent for this long is gone", gt=0)] = 25.0
    load_timeout_s: Annotated[float, _about("one load, from pull to ready; 0 = what the runtime asks for", ge=0)] = 0.0
    failure_expiry_s: Annotated[
        float, _about("a failed load isn't tried again on the same pod until then, unless asked for by name", ge=0)
    ] = 60.0
    dataplane_config: Annotated[str, _about("ModelMesh's MM_DATAPLANE_CONFIG: JSON text, or @FILE")] = ""
    owner: Annotated[str, _about("owner written into vmodels that name none")] = "repertory"
    labels: Annotated[tuple[str, ...], _about("labels of this pod in its instance record")] = ()
    grace_s: Annotated[float, _about("on SIGTERM, running answers may take this long to finish", ge=0)] = 30.0
    log_json: Annotated[bool, _about("logs as JSON lines")] = False
    log_level: Annotated[str, _about("debug, info, warning or error", pattern=r"^(?i:debug|info|warning|error)$")] = (
        "info"
    )
