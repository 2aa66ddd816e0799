"""Writes the configuration that Envoy starts with: its listeners, the mesh's clusters, and where the mesh controls it."""

import json
from pathlib import Path
from typing import Any

from common.addresses import parse_address
from common.errors import ConfigError
from common.log_headers import CALLER_HEADER
from mesh.access.tls import TlsIdentity, TlsMaterial
from mesh.config.schema import MeshConfig
from mesh.envoy.files import EnvoyFiles, write_whole
from mesh.envoy.plan import STAT_NAMES, Carrier
from mesh.envoy.routes import (
    CALLED_HEADER,
    JUDGE_HEADER,
    LUA_FILTER,
    MODEL_HEADERS,
    NAMESPACE,
    PEER_HEADER,
    closed_routes_text,
    mesh_cluster,
)

Json = dict[str, Any]

CONTROL_CLUSTER = "control"
CERTIFICATE, AUTHORITY = "certificate", "authority"
KEY_STATS = "repertory_keys"
"""What the names of the statistics of callers' keys begin with, before an underscore and the carrier."""
_TYPE = "type.googleapis.com/envoy."
_UNLIMITED = 1_000_000_000
_FIRST_FETCH_S = (
    1.0  # how long listeners wait for a mesh that does not answer: their calls go to the mesh until it has said more
)
_KEEP_ALIVE = {"interval": "30s", "timeout": "20s"}  # a crashed host sends no FIN
_STREAM_WINDOW_BYTES = 1024 * 1024
# Headers that callers must not send.
_OWN_HEADERS = (
    *(CALLER_HEADER, "x-repertory-name", "x-repertory-waited"),
    *(CALLED_HEADER, JUDGE_HEADER, PEER_HEADER),
)
# Fields that select a LoRA adapter, which the mesh resolves, loads and checks the key for.
_JUDGED_FIELDS = (("adapter_id",), ("lora_request", "lora_name"), ("adapter_parameters", "merge_strategy"))
_MIN_BUFFER_BYTES = 1024 * 1024
# Of a model's clusters, only what the mesh reads. With 2,000 clusters the others took 18 of 24 ms of each reading, and half of the time to add a cluster.
_STATS = [
    {"safe_regex": {"regex": rf"cluster\.{STAT_NAMES}_.*\.upstream_rq_(total|active|completed|time)"}},
    *({"prefix": f"cluster.{name}."} for name in (*map(mesh_cluster, Carrier), CONTROL_CLUSTER)),
    *(
        {"prefix": prefix}
        for prefix in (KEY_STATS, "cluster_manager.", "http.", "listener", "runtime.", "server.", "tls.", "worker")
    ),
]


def envoy_files(config: MeshConfig) -> EnvoyFiles:
    return EnvoyFiles(Path(config.envoy_dir).expanduser().absolute())


def write_bootstrap(config: MeshConfig) -> EnvoyFiles:
    """Write what Envoy starts with, and return where it is. Raises ConfigError, OSError."""
    files = envoy_files(config)
    files.make_directory()
    for carrier in Carrier:
        if not files.routes(carrier).exists():  # Envoy does not start without them
            write_whole(files.routes(carrier), closed_routes_text(carrier))
    write_whole(files.bootstrap, bootstrap_text(config, files))
    if config.tls_cert:
        write_tls(files, TlsIdentity(config.tls_cert, config.tls_key, config.tls_client_ca).material)
    return files


def bootstrap_text(config: MeshConfig, files: EnvoyFiles) -> str:
    """Return the configuration as JSON. Raises ConfigError for an address with port 0, which the mesh could not announce."""
    resources = {
        "listeners": [_listener(Carrier.GRPC, config, files), _listener(Carrier.HTTP, config, files)],
        "clusters": [
            *(_cluster(mesh_cluster(carrier), files.mesh(carrier), carrier) for carrier in Carrier),
            _cluster(CONTROL_CLUSTER, files.control, Carrier.GRPC),
        ],
    }
    source = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": f"{_FIRST_FETCH_S:g}s"}
    control = {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        # By default Envoy waits for up to 30 s before it reconnects to a restarted mesh.
        "grpc_services": [
            {
                "envoy_grpc": {
                    "cluster_name": CONTROL_CLUSTER,
                    "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}},
                }
            }
        ],
    }
    content: Json = {
        "node": {"id": config.instance_id or "repertory", "cluster": config.service_name},
        "admin": {"address": _address(files.admin)},
        "static_resources": resources,
        "dynamic_resources": {"ads_config": control, "cds_config": source},
        "stats_flush_interval": "1s",
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": _STATS}}},
        # The routes match names by a regular expression of as many as their table has.
        "layered_runtime": {
            "layers": [{"name": "limits", "static_layer": {"re2.max_program_size.error_level": _UNLIMITED}}]
        },
        "overload_manager": _connection_limit(config.max_connections or _UNLIMITED),
    }
    return json.dumps(content, indent=1)


def tls_texts(material: TlsMaterial) -> dict[str, str]:
    """Return the content of the files of secrets: the pod's certificate towards callers, and the authority that theirs must have, if any.

    A file may hold one secret.
    """
    certificate: Json = {
        "certificate_chain": {"inline_string": material.certificate.decode()},
        "private_key": {"inline_string": material.key.decode()},
    }
    secrets: dict[str, Json] = {CERTIFICATE: {"tls_certificate": certificate}}
    if material.authority:
        secrets[AUTHORITY] = {"validation_context": {"trusted_ca": {"inline_string": material.authority.decode()}}}
    kind = f"{_TYPE}extensions.transport_sockets.tls.v3.Secret"
    return {
        name: json.dumps({"resources": [{"@type": kind, "name": name, **secret}]}, indent=1)
        for name, secret in secrets.items()
    }


def write_tls(files: EnvoyFiles, material: TlsMaterial) -> None:
    """Write the files of secrets that have changed."""
    for name, text in tls_texts(material).items():
        write_whole(files.secret(name), text)


def _connection_limit(limit: int) -> Json:
    return {
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": f"{_TYPE}extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": limit,
                },
            }
        ]
    }


def _listener(carrier: Carrier, config: MeshConfig, files: EnvoyFiles) -> Json:
    is_grpc = carrier is Carrier.GRPC
    address = config.grpc_listen if is_grpc else config.http_listen
    parsed = parse_address(address)
    if not parsed.path and not parsed.port:
        raise ConfigError(f"{carrier}_listen {address}: Envoy needs a port; give a number instead of 0")
    chain: Json = {
        "filters": [
            {
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": _connection_manager(carrier, config, files),
            }
        ]
    }
    if config.tls_cert:
        chain["transport_socket"] = _tls_socket(carrier, config, files)
    return {
        "name": carrier,
        "address": _address(address),
        "filter_chains": [chain],
        "per_connection_buffer_limit_bytes": max(_MIN_BUFFER_BYTES, 0 if is_grpc else config.http_max_body_bytes),
    }


def _connection_manager(carrier: Carrier, config: MeshConfig, files: EnvoyFiles) -> Json:
    is_grpc = carrier is Carrier.GRPC
    idle_s = config.grpc_idle_timeout_s if is_grpc else config.http_idle_timeout_s
    common: Json = {"idle_timeout": f"{idle_s:g}s"}
    manager: Json = {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": carrier,
        "codec_type": "HTTP2" if is_grpc else "HTTP1",
        "rds": {
            "route_config_name": carrier,
            "config_source": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(files.routes(carrier)),
                    "watched_directory": {"path": str(files.directory)},
                },
            },
        },
        "http_filters": [*([] if is_grpc else _body_filters()), _lua_filter(), _filter("router", "Router", _ROUTER)],
        "early_header_mutation_extensions": [_strip(_OWN_HEADERS)],
        "common_http_protocol_options": common,
        "generate_request_id": not is_grpc,  # mesh and runtime make one for a call without
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": not is_grpc,
        "skip_xff_append": True,
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": "0s",
        "request_headers_timeout": f"{config.http_header_timeout_s:g}s",
    }
    if config.api_keys or config.api_keys_file:
        manager["access_log"] = [_key_counter(carrier)]
    if is_grpc:
        manager["http2_protocol_options"] = {
            "max_concurrent_streams": config.grpc_max_streams,
            "initial_stream_window_size": _STREAM_WINDOW_BYTES,
            "connection_keepalive": _KEEP_ALIVE,
        }
        if config.grpc_max_connection_age_s:
            common["max_connection_duration"] = f"{config.grpc_max_connection_age_s:g}s"
    else:
        manager["http_protocol_options"] = {"accept_http_10": True, "default_host_for_http_10": "localhost"}
        manager["local_reply_config"] = _error_shape()
    return manager


def _key_counter(carrier: Carrier) -> Json:
    """Count the calls of recognised callers by key, status and what answered them: a copy, or the mesh, which counts its calls itself."""
    code = "%GRPC_STATUS(SNAKE_STRING)%" if carrier is Carrier.GRPC else "%RESPONSE_CODE%"
    formats = {"by": f"%UPSTREAM_METADATA({NAMESPACE}:by)%", "code": code, "key": f"%REQ({CALLER_HEADER})%"}
    tags = [{"name": name, "value_format": text} for name, text in formats.items()]
    return {
        "name": "keys",
        "filter": {"header_filter": {"header": {"name": CALLER_HEADER, "present_match": True}}},
        "typed_config": {
            "@type": f"{_TYPE}extensions.access_loggers.stats.v3.Config",
            "stat_prefix": f"{KEY_STATS}_{carrier}",
            "counters": [{"stat": {"name": "calls", "tags": tags}, "value_fixed": 1}],
        },
    }


def _error_shape() -> Json:
    """Give errors of Envoy's own, as of a mesh that is down, the shape of the mesh's errors."""
    fields = {"message": "%LOCAL_REPLY_BODY%", "type": "unavailable_error", "param": None, "code": None}
    return {"body_format": {"json_format": {"error": fields}}}


def _body_filters() -> list[Json]:
    """Read the model's name from a JSON body into the header by which calls are routed."""
    rules = [_rule("model", "model"), *(_rule("judge", *path) for path in _JUDGED_FIELDS)]
    headers = {MODEL_HEADERS[Carrier.HTTP]: "model", JUDGE_HEADER: "judge"}
    mutations = [
        {"append": {"header": {"key": header, "value": f"%DYNAMIC_METADATA({NAMESPACE}:{key})%"}}}
        for header, key in headers.items()
    ]
    read, write = {"request_rules": {"rules": rules}}, {"mutations": {"request_mutations": mutations}}
    return [
        _filter("json_to_metadata", "JsonToMetadata", read),
        _filter("header_mutation", "HeaderMutation", write),
    ]


def _rule(key: str, *path: str) -> Json:
    """Return the rule that notes the text at a path of the body's fields."""
    found = {"metadata_namespace": NAMESPACE, "key": key}
    return {"selectors": [{"key": name} for name in path], "on_present": found}


def _lua_filter() -> Json:
    """Return the filter that runs a route's script. Calls on other routes do without it."""
    kind = f"{_TYPE}extensions.filters.http.lua.v3.Lua"
    return {"name": LUA_FILTER, "disabled": True, "typed_config": {"@type": kind}}


_ROUTER = {"suppress_envoy_headers": True}


def _filter(name: str, kind: str, options: Json) -> Json:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"{_TYPE}extensions.filters.http.{name}.v3.{kind}", **options},
    }


def _strip(headers: tuple[str, ...]) -> Json:
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": f"{_TYPE}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove": name} for name in headers],
        },
    }


def _tls_socket(carrier: Carrier, config: MeshConfig, files: EnvoyFiles) -> Json:
    common: Json = {
        "alpn_protocols": ["h2"] if carrier is Carrier.GRPC else ["http/1.1"],
        "tls_certificate_sds_secret_configs": [_secret(CERTIFICATE, files)],
    }
    if config.tls_client_ca:
        common["validation_context_sds_secret_config"] = _secret(AUTHORITY, files)
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": common,
            "require_client_certificate": bool(config.tls_client_ca),
        },
    }


def _secret(name: str, files: EnvoyFiles) -> Json:
    watched = {"path": str(files.secret(name)), "watched_directory": {"path": str(files.directory)}}
    return {"name": name, "sds_config": {"resource_api_version": "V3", "path_config_source": watched}}


def _cluster(name: str, address: str, carrier: Carrier) -> Json:
    protocol: Json = {"http2_protocol_options": {}} if carrier is Carrier.GRPC else {"http_protocol_options": {}}
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), _UNLIMITED)
    return {
        "name": name,
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(address)}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": protocol,
            }
        },
    }


def _address(text: str) -> Json:
    parsed = parse_address(text)
    if parsed.path:
        return {"pipe": {"path": parsed.path, "mode": 0o600}}
    return {"socket_address": {"address": parsed.host, "port_value": parsed.port}}
