"""Translates ModelMesh's environment variables into those of `repertory serve-mesh`, so that its controller's Deployment can run our pods.

A variable of ours that is set keeps its value. docs/from-modelmesh.md lists what is taken and what is ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.config import env_name
from common.errors import ConfigError

Convert = Callable[[str], str]

_INSTANCE_ID_CHARACTERS = 12
_SHUTDOWN_RESERVE_S, _MIN_SHUTDOWN_S = 5.0, 2.0
_METRICS_PORT = "2112"
_CLIENT_AUTH, _TRUST_CERTIFICATES = "MM_TLS_CLIENT_AUTH", "MM_TLS_TRUST_CERT_PATH"
_PASSPHRASES = ("MM_TLS_PRIVATE_KEY_PASSPHRASE", "MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE")


def _same(value: str) -> str:
    return value


def _on_all_hosts(port: str) -> str:
    return "" if port.upper() == "NONE" else f"0.0.0.0:{port}"


def _locally(port: str) -> str:
    return f"127.0.0.1:{port}"


def _unix(path: str) -> str:
    return f"unix:{path}"


def _file(path: str) -> str:
    return f"@{path}"


def _last_characters(pod_name: str) -> str:
    return pod_name[-_INSTANCE_ID_CHARACTERS:]


def _grace_s(milliseconds: str) -> str:
    return str(max(_MIN_SHUTDOWN_S, _number(milliseconds) / 1000 - _SHUTDOWN_RESERVE_S))


def _seconds(milliseconds: str) -> str:
    return str(_number(milliseconds) / 1000)


# By field of MeshConfig: the variables that set it, the strongest first.
TAKEN: Mapping[str, Mapping[str, Convert]] = {
    "service_name": {"MM_SERVICE_NAME": _same, "TAS_SERVICE_NAME": _same},
    "store": {"KV_STORE": _same},
    "kv_prefix": {"MM_KVSTORE_PREFIX": _same},
    "read_only": {"KV_READ_ONLY": _same},
    "grpc_listen": {"MM_SVC_GRPC_PORT": _on_all_hosts, "TAS_SVC_GRPC_PORT": _on_all_hosts},
    "grpc_max_message_bytes": {"MM_SVC_GRPC_MAX_MSG_SIZE": _same},
    "grpc_max_header_bytes": {"MM_SVC_GRPC_MAX_HEADERS_SIZE": _same},
    "grpc_max_connection_age_s": {"MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS": _same},
    "grpc_max_connection_age_grace_s": {"MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS": _same},
    "max_in_flight_per_copy": {"MM_MAX_INFLIGHT_PER_MODEL_COPY": _same},
    "instance_id": {"WKUBE_POD_NAME": _last_characters},
    "advertise_host": {"WKUBE_POD_IPADDR": _same},
    "location": {"MM_LOCATION": _same, "WKUBE_NODE_IP": _same},
    "zone": {"MM_ZONE": _same},
    "labels": {"MM_LABELS": _same},
    "type_constraints": {"MM_TYPE_CONSTRAINTS": _same, "MM_TYPE_CONSTRAINTS_PATH": _file},
    "dataplane_config": {"MM_DATAPLANE_CONFIG": _same, "MM_DATAPLANE_CONFIG_PATH": _file},
    "static_models": {
        "MM_AUTO_REGISTER_MODELS": _same,
        "MM_AUTO_REGISTER_MODEL": _same,
        "MM_AUTO_REGISTER_MODELS_PATH": _file,
        "MM_AUTO_REGISTER_MODEL_PATH": _file,
    },
    "owner": {"MM_DEFAULT_VMODEL_OWNER": _same},
    "failure_expiry_s": {"MM_LOAD_FAILURE_EXPIRY_TIME_MS": _seconds},
    "runtime_grpc": {"INTERNAL_GRPC_SOCKET_PATH": _unix, "INTERNAL_GRPC_PORT": _locally},
    "runtime_inference_grpc": {"INTERNAL_SERVING_GRPC_SOCKET_PATH": _unix, "INTERNAL_SERVING_GRPC_PORT": _locally},
    "tls_cert": {"MM_TLS_KEY_CERT_PATH": _same, "MM_SVC_GRPC_CA_CERT_PATH": _same, "TAS_SVC_GRPC_CA_CERT_PATH": _same},
    "tls_key": {
        "MM_TLS_PRIVATE_KEY_PATH": _same,
        "MM_SVC_GRPC_PRIVATE_KEY_PATH": _same,
        "TAS_SVC_GRPC_PRIVATE_KEY_PATH": _same,
    },
    "grace_s": {"SHUTDOWN_TIMEOUT_MS": _grace_s},
    "probe_listen": {"MM_PROBE_PORT": _on_all_hosts},
    "prestop_listen": {"MM_PRESTOP_WAIT_PORT": _on_all_hosts},
    "log_requests": {"MM_LOG_EACH_INVOKE": _same},
}

# ModelMesh refuses two of these variables, because neither is the stronger one.
_EXCLUSIVE = frozenset(
    {"type_constraints", "dataplane_config", "static_models", "runtime_grpc", "runtime_inference_grpc"}
)

# The defaults of ModelMesh. A pod without a service name is not one of ModelMesh's.
_DEFAULTS: Mapping[str, str] = {
    "kv_prefix": "tas-runtime",
    "http_listen": "0.0.0.0:8080",
    "probe_listen": "0.0.0.0:8089",
    "prestop_listen": "0.0.0.0:8090",
    "runtime_grpc": "127.0.0.1:8085",
    "runtime_http": "",
    "log_requests": "false",
}

# The controller keeps these ports free of a runtime's containers.
_PEER_LISTENERS: Mapping[str, str] = {"peer_grpc_listen": "0.0.0.0:11881", "peer_http_listen": "0.0.0.0:11882"}

IGNORED: Mapping[str, str] = {
    "MM_PAYLOAD_PROCESSORS": "payloads are sent nowhere",
    "MM_INFO_METRICS": "there is no metric of constant labels",
    "MM_SCALEUP_RPM_THRESHOLD": "copies follow the load, not a threshold",
    "MM_CONC_SCALEUP_BANDWIDTH_PCT": "copies follow the load, not a threshold",
    "MM_MULTI_PARALLELISM": "a request for several models goes to all of them at once",
    "MM_SEND_DEST_ID": "a hop names its model only",
    "MM_FAILFAST_UPGRADE_ENABLED": "a pod with failing loads stays ready",
    "BOOTSTRAP_CLEARANCE_PERIOD_MS": "a pod with failing loads stays ready",
    "MM_LOG_REQUEST_HEADERS": "headers are not logged",
    "CUSTOM_JVM_ARGS": "there is no Java process",
}
# Variables that `translate` reads together with others.
_READ_TOGETHER = frozenset({"MM_METRICS", _CLIENT_AUTH, _TRUST_CERTIFICATES})
_OTHER_PREFIXES = ("MM_", "TAS_")


@dataclass(frozen=True, slots=True)
class Translated:
    """`variables` are ours, by name. `warnings`: one sentence for each variable without effect."""

    variables: Mapping[str, str]
    warnings: tuple[str, ...]


def translate(environment: Mapping[str, str]) -> Translated:
    """Return our variables for those of ModelMesh. Raises ConfigError for values that ModelMesh refuses as well."""
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    is_modelmesh_pod = bool(given.keys() & TAKEN["service_name"].keys())
    fields = dict(_DEFAULTS) if is_modelmesh_pod else {}
    for field, variables in TAKEN.items():
        found = [name for name in variables if name in given]
        if len(found) > 1 and field in _EXCLUSIVE:
            raise ConfigError(f"environment: {found[0]} and {found[1]} are both set; unset one of them")
        if found:
            fields[field] = _converted(found[0], given[found[0]], variables[found[0]])
    if is_modelmesh_pod and fields.keys() >= {"tls_cert", "tls_key"}:
        # ModelMesh's pods share one certificate. It authenticates our pods to each other, trusted by itself.
        fields |= {"peer_tls_cert": fields["tls_cert"], "peer_tls_key": fields["tls_key"]}
        fields |= {"peer_tls_ca": fields["tls_cert"], "peer_tls_name": "", **_PEER_LISTENERS}
    warnings = []
    for read in (_metrics, _client_auth):
        found_fields, warning = read(given)
        fields |= found_fields
        warnings += [warning] if warning else []
    warnings += [f"{name} is ignored: {reason}" for name in sorted(given) if (reason := _reason(name))]
    return Translated({env_name(field): value for field, value in fields.items()}, tuple(warnings))


def _converted(name: str, value: str, convert: Convert) -> str:
    try:
        return convert(value)
    except ValueError:
        raise ConfigError(f"environment variable {name}: {value!r} is not a number") from None


def _number(text: str) -> float:
    return float(int(text))


def _metrics(given: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Read MM_METRICS, `KIND:KEY=VALUE;…`. Return the fields that it sets, and a warning about what is ignored."""
    kind, _, rest = given.get("MM_METRICS", "disabled").partition(":")
    if kind == "disabled":
        return {}, ""
    if kind != "prometheus":
        return {}, f"MM_METRICS is ignored: {kind} is not supported, only prometheus; /metrics is on the HTTP port"
    options = dict(part.partition("=")[::2] for part in rest.split(";") if part)
    fields = {
        "metrics_listen": _on_all_hosts(options.pop("port", _METRICS_PORT)),
        "metrics_tls": str(options.pop("scheme", "https") == "https").lower(),
    }
    unknown = sorted(options.keys() - {"mem_detail"})
    return fields, f"MM_METRICS: {', '.join(unknown)} has no effect" if unknown else ""


def _client_auth(given: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the field that requires callers' certificates, and a warning about what is ignored. Raises ConfigError."""
    if passphrase := next((name for name in _PASSPHRASES if name in given), ""):
        raise ConfigError(f"environment variable {passphrase}: encrypted keys are not supported; decrypt the key file")
    kind = given.get(_CLIENT_AUTH, "NONE").upper()
    if kind not in ("NONE", "OPTIONAL", "REQUIRE"):
        raise ConfigError(f"environment variable {_CLIENT_AUTH}: {kind} is neither NONE, OPTIONAL nor REQUIRE")
    if kind == "OPTIONAL":
        return {}, f"{_CLIENT_AUTH} OPTIONAL means NONE here: callers' certificates are either required or not read"
    if kind == "NONE":
        return {}, ""
    if _TRUST_CERTIFICATES not in given:
        raise ConfigError(f"environment variable {_CLIENT_AUTH} is REQUIRE; set {_TRUST_CERTIFICATES}, too")
    return {"tls_client_ca": given[_TRUST_CERTIFICATES]}, ""


def _reason(name: str) -> str:
    """Return why a variable has no effect; empty for one that has, and for one that is not ModelMesh's."""
    if name in IGNORED:
        return IGNORED[name]
    is_taken = name in _READ_TOGETHER or any(name in variables for variables in TAKEN.values())
    return "" if is_taken or not name.startswith(_OTHER_PREFIXES) else "it has no counterpart here"
