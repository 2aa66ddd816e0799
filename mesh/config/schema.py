"""Defines the configuration of one pod's mesh."""

from typing import Annotated, Any

import msgspec

from common.config import BARE_FLAG
from common.units import MIB


def _about(text: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **limits)


class MeshConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of `repertory serve-mesh`. Addresses are `HOST:PORT` or `unix:PATH`."""

    grpc_listen: Annotated[str, _about("address of gRPC: management, and inference by model name")] = "127.0.0.1:8033"
    http_listen: Annotated[str, _about("address of HTTP: OpenAI API, admin, health and metrics")] = "127.0.0.1:8080"
    advertise_host: Annotated[str, _about("host at which other pods reach this pod; empty = detected")] = ""
    instance_id: Annotated[str, _about("name of this pod; empty = derived from the host name")] = ""
    service_name: Annotated[str, _about("name of the mesh; pods with the same store and name form one mesh")] = (
        "repertory"
    )
    store: Annotated[
        str, _about("registry: embedded:DIR, etcd://HOST:PORT[,…][/PREFIX] or etcd:FILE.json (ModelMesh's KV_STORE)")
    ] = ""
    kv_prefix: Annotated[str, _about("prefix of the registry's keys (ModelMesh's MM_KVSTORE_PREFIX)")] = "mm"
    runtime_grpc: Annotated[str, _about("gRPC address of the runtime behind this mesh")] = (
        "unix:/tmp/repertory/runtime.sock"
    )
    runtime_inference_grpc: Annotated[
        str, _about("gRPC address of the runtime's inference methods; empty = runtime_grpc")
    ] = ""
    runtime_http: Annotated[str, _about("HTTP address of the runtime; empty = the runtime has none")] = (
        "unix:/tmp/repertory/runtime-http.sock"
    )
    envoy: Annotated[
        str,
        _about(
            "Envoy for loaded models' calls: auto = the installed one, or its path; "
            "external = started elsewhere with the files in envoy_dir; empty = none",
            extra={BARE_FLAG: "auto"},
        ),
    ] = ""
    envoy_threads: Annotated[
        int, _about("threads of Envoy that carry calls; 0 = one for each core, at most 16", ge=0)
    ] = 0
    workers: Annotated[
        int,
        _about(
            "processes on both ports for the calls of this pod's loaded models; 0 = the mesh carries all calls", ge=0
        ),
    ] = 0
    envoy_dir: Annotated[
        str, _about("directory that mesh and Envoy, or mesh and workers, share; only their user may enter it")
    ] = "/tmp/repertory/envoy"
    tls_cert: Annotated[str, _about("file of the certificate chain of both ports for callers; empty = plain text")] = ""
    tls_key: Annotated[str, _about("file of the key of tls_cert")] = ""
    tls_client_ca: Annotated[
        str,
        _about("files of the authorities that sign callers' certificates, comma separated; empty = callers need none"),
    ] = ""
    peer_grpc_listen: Annotated[
        str, _about("gRPC address for other pods over mutual TLS; empty = they use grpc_listen in plain text")
    ] = ""
    peer_http_listen: Annotated[
        str, _about("HTTP address for other pods over mutual TLS; empty = they use http_listen in plain text")
    ] = ""
    peer_tls_cert: Annotated[str, _about("file of this pod's certificate towards other pods")] = ""
    peer_tls_key: Annotated[str, _about("file of the key of peer_tls_cert")] = ""
    peer_tls_ca: Annotated[str, _about("file of the authority that signs the pods' certificates and nothing else")] = ""
    peer_tls_name: Annotated[
        str, _about("DNS name that every pod's certificate carries; empty = the first one in peer_tls_cert")
    ] = "repertory"
    wait_budget_s: Annotated[float, _about("longest time that a request waits for its model to be loaded", ge=0)] = (
        120.0
    )
    keep_alive_s: Annotated[
        float, _about("interval of SSE comments to a stream that waits for its first byte", gt=0)
    ] = 5.0
    max_held: Annotated[int, _about("largest number of requests that wait for one model to be loaded", ge=0)] = 1024
    api_keys: Annotated[
        tuple[str, ...],
        _about("accepted bearer keys, each of which allows everything; without keys, requests need none"),
    ] = ()
    api_keys_file: Annotated[
        str,
        _about(
            "YAML file of hashed keys with their names, scopes, models and limits; it is read again when it changes"
        ),
    ] = ""
    allowed_hosts: Annotated[
        tuple[str, ...],
        _about("further host names of this server in requests of browsers and, on loopback, of any program; * = any"),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        _about("origins such as https://chat.example whose web pages may call this server; * = any"),
    ] = ()
    grpc_max_message_bytes: Annotated[int, _about("largest gRPC message", gt=0)] = 16 * MIB
    grpc_max_header_bytes: Annotated[int, _about("largest headers of one gRPC call; 0 = gRPC's default", ge=0)] = 0
    grpc_max_connection_age_s: Annotated[
        float, _about("age at which a caller's gRPC connection is closed after its calls; 0 = none", ge=0)
    ] = 0.0
    grpc_max_connection_age_grace_s: Annotated[
        float, _about("time that calls have when their connection has reached that age; 0 = until they end", ge=0)
    ] = 0.0
    max_in_flight_per_copy: Annotated[
        int,
        _about(
            "requests of one copy that run or wait, if its runtime limits concurrency; 0 = max(16, 8 × limit), -1 = any",
            ge=-1,
        ),
    ] = 0
    http_max_body_bytes: Annotated[int, _about("largest HTTP request body", gt=0)] = 8 * MIB
    request_memory_bytes: Annotated[
        int, _about("memory of all requests that the pod holds; more are refused with RESOURCE_EXHAUSTED", gt=0)
    ] = 512 * MIB
    max_connections: Annotated[int, _about("largest number of HTTP connections; 0 = no limit", ge=0)] = 10_000
    http_header_timeout_s: Annotated[
        float, _about("time that an HTTP client has for the headers of a request, from its first byte on", gt=0)
    ] = 20.0
    http_body_timeout_s: Annotated[float, _about("time that an HTTP client has for the body of a request", gt=0)] = (
        300.0
    )
    http_idle_timeout_s: Annotated[
        float, _about("time after which an HTTP connection without requests is closed", gt=0)
    ] = 3630.0
    http_write_timeout_s: Annotated[
        float, _about("time after which a client that reads nothing of its response is disconnected", gt=0)
    ] = 120.0
    grpc_max_streams: Annotated[int, _about("largest number of concurrent calls of one gRPC connection", gt=0)] = 10_000
    grpc_idle_timeout_s: Annotated[
        float, _about("time after which a gRPC connection without calls is closed", gt=0)
    ] = 3600.0
    session_ttl_s: Annotated[
        float, _about("lifetime of the pod's session in the store; other pods drop this pod when it expires", gt=0)
    ] = 25.0
    load_timeout_s: Annotated[
        float, _about("time limit of one load, from pull to ready; 0 = the limit that the runtime reports", ge=0)
    ] = 0.0
    failure_expiry_s: Annotated[
        float,
        _about("time before a failed load is retried on the same pod; an explicit load request retries at once", ge=0),
    ] = 60.0
    dataplane_config: Annotated[
        str,
        _about(
            "gRPC methods and where their requests hold the model's name: JSON text or @FILE (ModelMesh's MM_DATAPLANE_CONFIG)"
        ),
    ] = ""
    owner: Annotated[str, _about("owner written into vmodels that name none; empty = none, as ModelMesh")] = ""
    location: Annotated[str, _about("location in this pod's instance record; empty = advertise_host or host name")] = ""
    zone: Annotated[str, _about("zone of this pod; further copies of a model are loaded in other zones first")] = ""
    labels: Annotated[tuple[str, ...], _about("labels in this pod's instance record")] = ()
    type_constraints: Annotated[
        str,
        _about(
            "pod labels that a type of model requires or prefers (ModelMesh's MM_TYPE_CONSTRAINTS): JSON text, or @FILE"
        ),
    ] = ""
    static_models: Annotated[
        str, _about("models to register at the start (ModelMesh's MM_AUTO_REGISTER_MODELS): JSON text, or @FILE")
    ] = ""
    models_file: Annotated[
        str, _about("YAML file of models and aliases to register at the start; it is read again after SIGHUP")
    ] = ""
    read_only: Annotated[bool, _about("refuse changes of registrations (ModelMesh's KV_READ_ONLY)")] = False
    probe_listen: Annotated[str, _about("address of ModelMesh's probes /ready and /live; empty = none")] = ""
    prestop_listen: Annotated[
        str,
        _about("address of ModelMesh's preStop hook /prestop, which answers when this pod has drained; empty = none"),
    ] = ""
    metrics_listen: Annotated[
        str, _about("second address of /metrics, which needs no key; empty = only the HTTP address")
    ] = ""
    metrics_tls: Annotated[bool, _about("serve metrics_listen by HTTPS with a self-signed certificate")] = False
    grace_s: Annotated[
        float,
        _about("time that running requests have to finish after SIGTERM, or before their model is unloaded", ge=0),
    ] = 30.0
    log_json: Annotated[bool, _about("write logs as JSON lines")] = False
    log_requests: Annotated[bool, _about("log a line for each request")] = True
    log_level: Annotated[
        str,
        _about(
            "lowest level that is logged: debug, info, warning or error", pattern=r"^(?i:debug|info|warning|error)$"
        ),
    ] = "info"
