"""ModelMesh's environment variables: which of ours they become, which are refused, and which are ignored."""

from pathlib import Path

import pytest

from common.config import load
from common.errors import ConfigError
from mesh.config.modelmesh_environment import IGNORED, TAKEN, translate
from mesh.config.schema import MeshConfig

PAGE = Path(__file__).parents[3] / "docs" / "from-modelmesh.md"

# What ModelMesh's controller sets for a pod, with its own values.
DEPLOYMENT = {
    "MM_SERVICE_NAME": "modelmesh-serving",
    "MM_SVC_GRPC_PORT": "8033",
    "WKUBE_POD_NAME": "modelmesh-serving-repertory-6f8d9c7b5-x2k4p",
    "WKUBE_POD_IPADDR": "10.1.2.3",
    "MM_LOCATION": "10.0.0.7",
    "KV_STORE": "etcd:/opt/kserve/mmesh/etcd/etcd_connection",
    "MM_METRICS": "prometheus:port=2112;scheme=https",
    "SHUTDOWN_TIMEOUT_MS": "90000",
    "MM_KVSTORE_PREFIX": "mm",
    "MM_DEFAULT_VMODEL_OWNER": "ksp",
    "MM_LABELS": "mt:llm,mt:llm:1,pv:grpc-v2,rt:repertory",
    "MM_TYPE_CONSTRAINTS_PATH": "/etc/watson/mmesh/config/type_constraints",
    "MM_DATAPLANE_CONFIG_PATH": "/etc/watson/mmesh/config/dataplane_api_config",
    "MM_SVC_GRPC_MAX_MSG_SIZE": "16777216",
    "MM_LOG_EACH_INVOKE": "true",
    "INTERNAL_GRPC_PORT": "8003",
    "INTERNAL_SERVING_GRPC_PORT": "8004",
}


def config_of(environment: dict[str, str]) -> MeshConfig:
    return load(MeshConfig, flags={}, env={**translate(environment).variables, **environment})


def test_translate_configures_a_pod_as_the_controller_asks() -> None:
    translated = translate(DEPLOYMENT)
    assert not translated.warnings
    assert config_of(DEPLOYMENT) == MeshConfig(
        service_name="modelmesh-serving",
        grpc_listen="0.0.0.0:8033",
        http_listen="0.0.0.0:8080",
        instance_id="d9c7b5-x2k4p",
        advertise_host="10.1.2.3",
        location="10.0.0.7",
        store="etcd:/opt/kserve/mmesh/etcd/etcd_connection",
        metrics_listen="0.0.0.0:2112",
        metrics_tls=True,
        grace_s=85.0,
        kv_prefix="mm",
        owner="ksp",
        labels=("mt:llm", "mt:llm:1", "pv:grpc-v2", "rt:repertory"),
        type_constraints="@/etc/watson/mmesh/config/type_constraints",
        dataplane_config="@/etc/watson/mmesh/config/dataplane_api_config",
        grpc_max_message_bytes=16 * 1024 * 1024,
        log_requests=True,
        runtime_grpc="127.0.0.1:8003",
        runtime_inference_grpc="127.0.0.1:8004",
        runtime_http="",
        probe_listen="0.0.0.0:8089",
        prestop_listen="0.0.0.0:8090",
    )


def test_translate_changes_nothing_without_modelmeshs_variables() -> None:
    translated = translate({"PATH": "/bin", "KUBERNETES_PORT": "tcp://10.0.0.1:443", "REPERTORY_ZONE": "a"})
    assert (translated.variables, translated.warnings) == ({}, ())


def test_translate_sets_modelmeshs_defaults_only_for_a_named_service() -> None:
    assert config_of({"MM_LABELS": "gpu"}) == MeshConfig(labels=("gpu",))
    named = config_of({"TAS_SERVICE_NAME": "old"})
    assert (named.service_name, named.kv_prefix, named.probe_listen) == ("old", "tas-runtime", "0.0.0.0:8089")
    assert not named.log_requests


def test_translate_our_own_variable_wins() -> None:
    environment = {**DEPLOYMENT, "REPERTORY_KV_PREFIX": "ours", "REPERTORY_RUNTIME_HTTP": "127.0.0.1:8005"}
    config = config_of(environment)
    assert (config.kv_prefix, config.runtime_http) == ("ours", "127.0.0.1:8005")


@pytest.mark.parametrize(
    ("environment", "field", "value"),
    [
        ({"MM_PROBE_PORT": "NONE", "MM_SERVICE_NAME": "a"}, "probe_listen", ""),
        ({"MM_PRESTOP_WAIT_PORT": "9090"}, "prestop_listen", "0.0.0.0:9090"),
        ({"WKUBE_POD_NAME": "short"}, "instance_id", "short"),
        ({"SHUTDOWN_TIMEOUT_MS": "3000"}, "grace_s", 2.0),
        ({"MM_LOAD_FAILURE_EXPIRY_TIME_MS": "20000"}, "failure_expiry_s", 20.0),
        ({"MM_METRICS": "prometheus:scheme=http"}, "metrics_listen", "0.0.0.0:2112"),
        ({"MM_METRICS": "prometheus:scheme=http"}, "metrics_tls", False),
        ({"MM_METRICS": "disabled"}, "metrics_listen", ""),
        ({"INTERNAL_GRPC_SOCKET_PATH": "/tmp/mmesh/grpc.sock"}, "runtime_grpc", "unix:/tmp/mmesh/grpc.sock"),
        ({"WKUBE_NODE_IP": "10.0.0.1"}, "location", "10.0.0.1"),
        ({"WKUBE_NODE_IP": "10.0.0.1", "MM_LOCATION": "here"}, "location", "here"),
        ({"MM_LABELS": "  "}, "labels", ()),
        ({"KV_READ_ONLY": "true"}, "read_only", True),
        ({"MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS": "300"}, "grpc_max_connection_age_s", 300.0),
        ({"MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS": "30"}, "grpc_max_connection_age_grace_s", 30.0),
        ({"MM_SVC_GRPC_MAX_HEADERS_SIZE": "16384"}, "grpc_max_header_bytes", 16384),
        ({"MM_MAX_INFLIGHT_PER_MODEL_COPY": "-1"}, "max_in_flight_per_copy", -1),
    ],
)
def test_translate_one_variable(environment: dict[str, str], field: str, value: object) -> None:
    assert getattr(config_of(environment), field) == value


@pytest.mark.parametrize(
    "names",
    [
        ("MM_TYPE_CONSTRAINTS", "MM_TYPE_CONSTRAINTS_PATH"),
        ("MM_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG_PATH"),
        ("INTERNAL_GRPC_SOCKET_PATH", "INTERNAL_GRPC_PORT"),
    ],
)
def test_translate_refuses_two_sources_of_one_setting(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{names[0]} and {names[1]}"):
        translate(dict.fromkeys(names, "1"))


TLS = {"MM_TLS_KEY_CERT_PATH": "/tls/tls.crt", "MM_TLS_PRIVATE_KEY_PATH": "/tls/tls.key"}


def test_translate_tls_as_the_controller_sets_it() -> None:
    config = config_of({**TLS, "MM_TLS_CLIENT_AUTH": "REQUIRE", "MM_TLS_TRUST_CERT_PATH": "/tls/tls.crt,/tls/ca.crt"})
    assert (config.tls_cert, config.tls_key) == ("/tls/tls.crt", "/tls/tls.key")
    assert config.tls_client_ca == "/tls/tls.crt,/tls/ca.crt"
    without = translate({**TLS, "MM_TLS_CLIENT_AUTH": "OPTIONAL", "MM_TLS_TRUST_CERT_PATH": "/tls/ca.crt"})
    assert "REPERTORY_TLS_CLIENT_CA" not in without.variables
    assert "OPTIONAL means NONE" in without.warnings[0]


def test_translate_lets_pods_share_the_certificate() -> None:
    shared = config_of({**DEPLOYMENT, **TLS})
    assert (shared.peer_tls_cert, shared.peer_tls_key) == ("/tls/tls.crt", "/tls/tls.key")
    assert (shared.peer_tls_ca, shared.peer_tls_name) == ("/tls/tls.crt", "")
    assert (shared.peer_grpc_listen, shared.peer_http_listen) == ("0.0.0.0:11881", "0.0.0.0:11882")
    assert not config_of(TLS).peer_tls_cert, "the listeners of a pod that is not ModelMesh's are chosen by the user"


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"MM_TLS_PRIVATE_KEY_PASSPHRASE": "secret"}, "encrypted keys"),
        ({"MM_TLS_CLIENT_AUTH": "REQUIRE"}, "MM_TLS_TRUST_CERT_PATH"),
        ({"MM_TLS_CLIENT_AUTH": "perhaps"}, "PERHAPS"),
    ],
)
def test_translate_refuses_tls_that_cannot_be(environment: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError, match=error) as caught:
        translate({**TLS, **environment})
    assert "secret" not in str(caught.value)


def test_translate_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match="SHUTDOWN_TIMEOUT_MS: 'soon'"):
        translate({"SHUTDOWN_TIMEOUT_MS": "soon"})


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("MM_PAYLOAD_PROCESSORS", "logger://*?*", "payloads are sent nowhere"),
        ("MM_ENABLE_SSL", "false", "no counterpart"),
        ("MM_METRICS", "statsd:port=8126", "statsd is not supported"),
        ("MM_METRICS", "prometheus:per_model_metrics=true;mem_detail=all", "per_model_metrics has no effect"),
    ],
)
def test_translate_warns_of_what_has_no_effect(name: str, value: str, warning: str) -> None:
    (found,) = translate({name: value}).warnings
    assert found.startswith(name)
    assert warning in found


def test_translate_every_variable_is_documented() -> None:
    page = PAGE.read_text()
    names = {"MM_METRICS", *IGNORED, *(name for variables in TAKEN.values() for name in variables)}
    assert not [
        name
        for name in names
        if f"`{name}`" not in page and not name.startswith(("MM_AUTO_REGISTER", "MM_SVC_GRPC_", "TAS_"))
    ]
