"""Writes the routes of Envoy's two listeners: which calls Envoy may carry by itself, and that all others go to the mesh.

What a route decides, it decides in favour of the mesh: a call with anything unusual takes the mesh's path, where every case is handled.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.log_headers import CALLER_HEADER
from common.web_policy import WebPolicy
from mesh.access.api_keys import ApiKey
from mesh.access.peer_keys import PEER_KEY_HEADER
from mesh.envoy.lua import admit_peers_script, admit_script, choose_script
from mesh.envoy.plan import Carrier, name_prefix

Json = dict[str, Any]

MODEL_HEADERS = {Carrier.GRPC: "mm-model-id", Carrier.HTTP: "x-repertory-model"}
"""The headers that name the model: the callers' own, or the one that Envoy writes from the body."""

JUDGE_HEADER = "x-repertory-judge"
"""Set by Envoy for a body with a field that only the mesh can act on."""

PEER_HEADER = "x-repertory-peer"
"""Set by Envoy for a call whose sender it has recognised as another pod."""

LUA_FILTER = "envoy.filters.http.lua"
BODY_FILTERS = ("envoy.filters.http.json_to_metadata", "envoy.filters.http.header_mutation")
_TYPE = "type.googleapis.com/envoy."
_DISABLED = {"@type": f"{_TYPE}config.route.v3.FilterConfig", "config": {}, "disabled": True}

# Methods that the mesh itself answers, or refuses.
_MESH_METHODS = (
    "/mmesh.",
    "/com.ibm.watson.",
    "/repertory.",
    "/grpc.",
    "/inference.GRPCInferenceService/Server",
    "/inference.GRPCInferenceService/ModelReady",
)
# Headers that only the mesh can act on.
_GRPC_EXCEPTIONS = (
    *("mm-model-id-bin", "mm-vmodel-id", "mm-vmodel-id-bin", "mm-required", "tas-model-id"),
    *("repertory-hop", "repertory-peer-key", "grpc-encoding"),
)
_HTTP_EXCEPTIONS = (
    *("mm-model-id", "repertory-hop", "repertory-peer-key"),
    *("origin", "sec-fetch-site", "content-encoding", "expect"),
)
_JSON = "^application/json(\\s*;.*)?$"
_ADDRESS_HOSTS = (r"localhost", r"[a-z0-9.-]+\.localhost", r"\d+\.\d+\.\d+\.\d+", r"\[[0-9a-f:.]+\]")


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """What the routes depend on.

    Attributes:
        keys: the callers' keys; None if callers need none.
        peer_digests: the SHA-256 of the secrets by which other pods are recognised.
        limit: calls that a copy may have at once; 0 for any number.
        paths: the HTTP paths whose body names the model in its field `model`.
        max_body_bytes: the largest HTTP body. max_message_bytes: the largest gRPC message.
        web_policy: whose rules of Host apply to callers without keys; None for a unix socket.
    """

    keys: tuple[ApiKey, ...] | None
    peer_digests: tuple[str, ...]
    limit: int
    paths: Sequence[str]
    max_body_bytes: int
    max_message_bytes: int
    web_policy: WebPolicy | None


def mesh_cluster(carrier: Carrier) -> str:
    return f"mesh-{carrier}"


def routes_text(carrier: Carrier, settings: RouteSettings) -> str:
    """Return the content of a listener's file of routes."""
    is_grpc = carrier is Carrier.GRPC
    routes = _grpc_routes(settings) if is_grpc else _http_routes(settings)
    # A refused call is sent again from this buffer. Twice the message, as the mesh keeps it.
    buffer_bytes = 2 * settings.max_message_bytes if is_grpc else settings.max_body_bytes
    return _text(carrier, routes, {"request_body_buffer_limit": buffer_bytes})


def closed_routes_text(carrier: Carrier) -> str:
    """Return routes that leave every call to the mesh, for an Envoy that starts before its mesh."""
    return _text(carrier, [_to_mesh(carrier, {"prefix": "/"})], {})


def _text(carrier: Carrier, routes: list[Json], options: Json) -> str:
    host: Json = {
        "name": carrier,
        "domains": ["*"],
        "routes": routes,
        "response_headers_to_remove": ["x-repertory-logged"],
        **options,
    }
    config = {"@type": f"{_TYPE}config.route.v3.RouteConfiguration", "name": carrier, "virtual_hosts": [host]}
    return json.dumps({"resources": [config]}, indent=1)


def _grpc_routes(settings: RouteSettings) -> list[Json]:
    carried = [{"name": "mm-model-id", "present_match": True}, *map(_absent, _GRPC_EXCEPTIONS)]
    return [
        *(_to_mesh(Carrier.GRPC, {"prefix": prefix}) for prefix in _MESH_METHODS),
        _from_peers(Carrier.GRPC, {"prefix": "/"}, settings),
        _carried(Carrier.GRPC, {"prefix": "/", "headers": carried}, settings),
        _to_mesh(Carrier.GRPC, {"prefix": "/"}),
    ]


def _http_routes(settings: RouteSettings) -> list[Json]:
    conditions: list[Json] = [
        {"name": ":method", "string_match": {"exact": "POST"}},
        {"name": "content-type", "string_match": {"safe_regex": {"regex": _JSON}}},
        {"name": "content-length", "range_match": {"start": 1, "end": settings.max_body_bytes + 1}},
        *map(_absent, _HTTP_EXCEPTIONS),
    ]
    if host := _host_pattern(settings):
        conditions.append({"name": ":authority", "string_match": {"safe_regex": {"regex": host}}})
    return [
        *(_from_peers(Carrier.HTTP, {"path": path}, settings) for path in settings.paths),
        *(_carried(Carrier.HTTP, {"path": path, "headers": conditions}, settings) for path in settings.paths),
        _to_mesh(Carrier.HTTP, {"prefix": "/"}),
    ]


def _host_pattern(settings: RouteSettings) -> str:
    """Return a pattern of Host headers that certainly name this server; empty if any will do. The mesh judges what does not match."""
    policy = settings.web_policy
    if settings.keys is not None or policy is None or not policy.is_local or "*" in policy.hosts:
        return ""
    names = [*(re.escape(name) for name in sorted(policy.hosts)), *_ADDRESS_HOSTS]
    return f"(?i)^({'|'.join(names)})(:[0-9]+)?$"


def _absent(name: str) -> Json:
    return {"name": name, "present_match": True, "invert_match": True}


def _carried(carrier: Carrier, match: Json, settings: RouteSettings) -> Json:
    """Return a route of callers on which Envoy chooses the cluster by the model's name."""
    header, prefix = MODEL_HEADERS[carrier], name_prefix(carrier, from_peers=False)
    if settings.keys is None:
        route = _chosen(
            carrier, match, choose_script(header, prefix, mesh_cluster(carrier), limit=settings.limit, admitted="")
        )
        # Nobody checks them, and a runtime must not see them.
        return {**route, "request_headers_to_remove": ["authorization", "x-api-key"]}
    script = choose_script(header, prefix, mesh_cluster(carrier), limit=settings.limit, admitted=CALLER_HEADER)
    return {**_chosen(carrier, match, script), "typed_per_filter_config": _lua(admit_script(header, settings.keys))}


def _from_peers(carrier: Carrier, match: Json, settings: RouteSettings) -> Json:
    """Return a route of calls that other pods send to this pod's copy of the model that they name."""
    conditions = [{"name": name, "present_match": True} for name in ("mm-model-id", PEER_KEY_HEADER)]
    prefix = name_prefix(carrier, from_peers=True)
    script = choose_script("mm-model-id", prefix, mesh_cluster(carrier), limit=0, admitted=PEER_HEADER)
    filters = _lua(admit_peers_script(settings.peer_digests))
    if carrier is Carrier.HTTP:
        filters |= dict.fromkeys(BODY_FILTERS, _DISABLED)
    return {**_chosen(carrier, {**match, "headers": conditions}, script), "typed_per_filter_config": filters}


def _chosen(carrier: Carrier, match: Json, script: str) -> Json:
    specifier = {
        "name": "choose",
        "typed_config": {
            "@type": f"{_TYPE}extensions.router.cluster_specifiers.lua.v3.LuaConfig",
            "source_code": {"inline_string": script},
            "default_cluster": mesh_cluster(carrier),
        },
    }
    action = {"inline_cluster_specifier_plugin": {"extension": specifier}, "retry_policy": _RETRY, **_NO_TIMEOUT}
    return {"match": match, "route": action}


def _lua(script: str) -> Json:
    source = {"source_code": {"inline_string": script}}
    return {LUA_FILTER: {"@type": f"{_TYPE}extensions.filters.http.lua.v3.LuaPerRoute", **source}}


def _to_mesh(carrier: Carrier, match: Json) -> Json:
    route: Json = {"match": match, "route": {"cluster": mesh_cluster(carrier), **_NO_TIMEOUT}}
    if carrier is Carrier.HTTP:
        route["typed_per_filter_config"] = dict.fromkeys(BODY_FILTERS, _DISABLED)
    return route


_NO_TIMEOUT = {"timeout": "0s", "idle_timeout": "0s"}
# The next tier takes a call that was refused, after a pause that only has to be longer than nothing.
_RETRY = {
    "retry_on": "retriable-headers,connect-failure,refused-stream,reset",
    "retriable_headers": [{"name": "x-repertory-not-here", "present_match": True}],
    "num_retries": 2,
    "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.005s"},
    "retry_priority": {
        "name": "envoy.retry_priorities.previous_priorities",
        "typed_config": {
            "@type": f"{_TYPE}extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
            "update_frequency": 1,
        },
    },
}
