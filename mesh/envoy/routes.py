"""Writes the routes of Envoy's two listeners: which calls Envoy may carry by itself, and that all others go to the mesh.

Envoy carries plain calls only. A call with anything unusual goes to the mesh, which handles every case.
Envoy's own matchers route calls for the names in the routes' table. A script routes calls for other names, at ten times the cost.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.log_headers import CALLER_HEADER
from common.web_policy import WebPolicy
from mesh.access.api_keys import ApiKey
from mesh.access.peer_keys import PEER_KEY_HEADER
from mesh.envoy.lua import admit_peers_script, admit_script, choose_script
from mesh.envoy.name_matcher import name_matcher
from mesh.envoy.name_table import Names
from mesh.envoy.plan import Carrier, name_prefix

Json = dict[str, Any]

MODEL_HEADERS = {Carrier.GRPC: "mm-model-id", Carrier.HTTP: "x-repertory-model"}
"""The headers that name the model: the callers' own, or the one that Envoy writes from the body."""

CALLED_HEADER = MODEL_HEADERS[Carrier.HTTP]
"""Set by Envoy to the name by which the caller called the model, which the model's id replaces. Callers cannot send it."""

NAMESPACE = "repertory"
"""Of the metadata of clusters, endpoints and bodies from which headers are written."""

JUDGE_HEADER = "x-repertory-judge"
"""Set by Envoy for a body with a field that only the mesh can act on."""

PEER_HEADER = "x-repertory-peer"
"""Set by Envoy for a call whose sender it has recognised as another pod."""

LUA_FILTER = "envoy.filters.http.lua"
BODY_FILTERS = ("envoy.filters.http.json_to_metadata", "envoy.filters.http.header_mutation")
_TYPE = "type.googleapis.com/envoy."
_DISABLED = {"@type": f"{_TYPE}config.route.v3.FilterConfig", "config": {}, "disabled": True}

# What calls to copies get, by the keys of the cluster's metadata. The mesh's own clusters have none, so that its calls stay as they are.
_WRITTEN = {
    Carrier.GRPC: {CALLED_HEADER: "name", "mm-model-id": "model", "mm-model-id-bin": "model_bin"},
    Carrier.HTTP: {"mm-model-id": "model"},
}

MESH_METHODS = (
    "/mmesh.",
    "/com.ibm.watson.",
    "/repertory.",
    "/grpc.",
    "/inference.GRPCInferenceService/Server",
    "/inference.GRPCInferenceService/ModelReady",
)
"""Methods that the mesh itself answers, or refuses."""

# Headers of gRPC that only the mesh can act on.
_GRPC_EXCEPTIONS = (
    *("mm-model-id-bin", "mm-vmodel-id", "mm-vmodel-id-bin", "mm-required", "tas-model-id"),
    *("repertory-hop", "repertory-peer-key", "grpc-encoding"),
)
HTTP_EXCEPTIONS = (
    *("mm-model-id", "repertory-hop", "repertory-peer-key"),
    *("origin", "sec-fetch-site", "content-encoding", "expect"),
)
"""Headers of HTTP that only the mesh can act on."""

_KEY_HEADERS = ("authorization", "x-api-key")
_JSON = "^application/json(\\s*;.*)?$"
_ADDRESS_HOSTS = (r"localhost", r"[a-z0-9.-]+\.localhost", r"\d+\.\d+\.\d+\.\d+", r"\[[0-9a-f:.]+\]")


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """What the routes depend on.

    Attributes:
        keys: the callers' keys; None if callers need none.
        peer_digests: the SHA-256 of the secrets by which other pods are recognised.
        limit: calls that a copy may have at once; 0 for any number.
        names: by carrier, names whose clusters exist. They are looked up in a table unless there is a limit.
        paths: the HTTP paths whose body names the model in its field `model`.
        max_body_bytes: the largest HTTP body. max_message_bytes: the largest gRPC message.
        web_policy: the rules of Host for callers without keys; None for a unix socket.
    """

    keys: tuple[ApiKey, ...] | None
    peer_digests: tuple[str, ...]
    limit: int
    paths: Sequence[str]
    max_body_bytes: int
    max_message_bytes: int
    web_policy: WebPolicy | None
    names: Names = field(default_factory=dict)


def mesh_cluster(carrier: Carrier) -> str:
    return f"mesh-{carrier}"


def routes_text(carrier: Carrier, settings: RouteSettings) -> str:
    """Return the content of a listener's file of routes."""
    is_grpc = carrier is Carrier.GRPC
    routing = _grpc_routing(settings) if is_grpc else {"routes": _http_routes(settings)}
    # A refused call is sent again from this buffer. Twice the message, as the mesh keeps it.
    buffer_bytes = 2 * settings.max_message_bytes if is_grpc else settings.max_body_bytes
    return _text(carrier, {**routing, "request_body_buffer_limit": buffer_bytes, "retry_policy": _RETRY})


def closed_routes_text(carrier: Carrier) -> str:
    """Return routes that leave every call to the mesh, for an Envoy that starts before its mesh."""
    return _text(carrier, {"routes": [_to_mesh(carrier, {"prefix": "/"})]})


def _text(carrier: Carrier, options: Json) -> str:
    host: Json = {
        "name": carrier,
        "domains": ["*"],
        "response_headers_to_remove": ["x-repertory-logged"],
        **options,
    }
    config = {"@type": f"{_TYPE}config.route.v3.RouteConfiguration", "name": carrier, "virtual_hosts": [host]}
    return json.dumps(
        {"resources": [config]}
    )  # ten times as fast as with an indent, which only Python's own encoder has


def _grpc_routing(settings: RouteSettings) -> Json:
    """Return the routes, and before them a look-up of the names in the table."""
    carrier = Carrier.GRPC
    others = [
        *(_to_mesh(Carrier.GRPC, {"prefix": prefix}) for prefix in MESH_METHODS),
        *_from_peers(Carrier.GRPC, {"prefix": "/"}, settings),
        *_carried(Carrier.GRPC, {"prefix": "/", "headers": [*map(_absent, _GRPC_EXCEPTIONS)]}, settings),
        _to_mesh(Carrier.GRPC, {"prefix": "/"}),
    ]
    names = settings.names.get(carrier)
    if not names or settings.limit:
        return {"routes": others}
    removed = {"request_headers_to_remove": list(_KEY_HEADERS)} if settings.keys is None else {}
    prefix = name_prefix(carrier, from_peers=False)
    routes: dict[str, Json] = {
        name: {
            "match": {"prefix": "/"},
            "route": {"cluster": f"{prefix}/{name}", **_NO_TIMEOUT},
            "request_headers_to_add": _written(carrier, name),
            **removed,
        }
        for name in names
    }
    matcher = name_matcher(
        MODEL_HEADERS[carrier],
        routes,
        others,
        absent=_GRPC_EXCEPTIONS,
        present=(CALLER_HEADER,) if settings.keys is not None else (),
        other_paths=MESH_METHODS,
    )
    return {"matcher": matcher}


def _http_routes(settings: RouteSettings) -> list[Json]:
    conditions: list[Json] = [
        {"name": ":method", "string_match": {"exact": "POST"}},
        {"name": "content-type", "string_match": {"safe_regex": {"regex": _JSON}}},
        {"name": "content-length", "range_match": {"start": 1, "end": settings.max_body_bytes + 1}},
        *map(_absent, HTTP_EXCEPTIONS),
    ]
    paths = {"safe_regex": {"regex": "|".join(map(re.escape, settings.paths))}}
    if host := _host_pattern(settings):
        conditions.append({"name": ":authority", "string_match": {"safe_regex": {"regex": host}}})
    return [
        *_from_peers(Carrier.HTTP, paths, settings),
        *_carried(Carrier.HTTP, {**paths, "headers": conditions}, settings),
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


def _carried(carrier: Carrier, match: Json, settings: RouteSettings) -> list[Json]:
    """Return the routes of callers on which Envoy chooses the cluster by the model's name.

    Envoy routes a call a second time once a filter has read the model from its body or recognised its key. The last route is the one before that.
    """
    header, mesh = MODEL_HEADERS[carrier], mesh_cluster(carrier)
    admitted = [{"name": CALLER_HEADER, "present_match": True}] if settings.keys is not None else []
    conditions = [*match["headers"], *([_absent(JUDGE_HEADER)] if carrier is Carrier.HTTP else []), *admitted]
    named = {**match, "headers": [{"name": header, "present_match": True}, *conditions]}
    script = choose_script(header, name_prefix(carrier, from_peers=False), mesh, limit=settings.limit)
    routes = [_to_copies(carrier, named, _by_script(script, mesh))]
    if carrier is Carrier.HTTP and (names := settings.names.get(carrier)) and not settings.limit:
        known = {"name": header, "string_match": {"safe_regex": {"regex": "|".join(map(re.escape, names))}}}
        listed = {**match, "headers": [known, *conditions]}
        routes.insert(0, _to_copies(carrier, listed, _by_table(header, carrier, names)))
    if settings.keys is not None or carrier is Carrier.HTTP:
        routes.append(_route(match, {"cluster": mesh}))
    if settings.keys is None:
        # Without keys these headers are not checked, and a runtime must not see them.
        for route in routes:
            route.setdefault("request_headers_to_remove", []).extend(_KEY_HEADERS)
        return routes
    admit = _lua(admit_script(header, settings.keys))
    return [*routes[:-1], {**routes[-1], "typed_per_filter_config": admit}]


def _from_peers(carrier: Carrier, match: Json, settings: RouteSettings) -> list[Json]:
    """Return the routes of calls that other pods send to this pod's copy of the model that they name.

    The second one is that of calls whose sender Envoy has not recognised yet.
    """
    conditions = [{"name": name, "present_match": True} for name in ("mm-model-id", PEER_KEY_HEADER)]
    mesh = mesh_cluster(carrier)
    script = choose_script("mm-model-id", name_prefix(carrier, from_peers=True), mesh, limit=0)
    filters = _lua(admit_peers_script(settings.peer_digests))
    if carrier is Carrier.HTTP:
        filters |= dict.fromkeys(BODY_FILTERS, _DISABLED)
    recognised = {**match, "headers": [*conditions, {"name": PEER_HEADER, "present_match": True}]}
    return [
        _route(recognised, _specified(_by_script(script, mesh))),
        {**_route({**match, "headers": conditions}, {"cluster": mesh}), "typed_per_filter_config": filters},
    ]


def _to_copies(carrier: Carrier, match: Json, specifier: Json) -> Json:
    """Return a route to the copies of the model that a call names. Its headers are written once, before the first attempt."""
    removed = [] if carrier is Carrier.GRPC else [CALLED_HEADER]
    return {
        **_route(match, _specified(specifier)),
        "request_headers_to_add": _written(carrier),
        "request_headers_to_remove": removed,
    }


def _written(carrier: Carrier, name: str = "") -> list[Json]:
    """Return the headers that calls to copies get. `name`: the model's name if the route is that of one name, which costs a call less to write."""
    values = {header: f"%METADATA(CLUSTER:{NAMESPACE}:{key})%" for header, key in _WRITTEN[carrier].items()}
    if name:
        values[CALLED_HEADER] = name.replace("%", "%%")
    return [
        {"header": {"key": header, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for header, value in values.items()
    ]


def _route(match: Json, target: Json) -> Json:
    """Return a route whose refused calls are sent again, as the virtual host has it."""
    return {"match": match, "route": {**target, **_NO_TIMEOUT}}


def _specified(specifier: Json) -> Json:
    return {"inline_cluster_specifier_plugin": {"extension": {"name": "choose", "typed_config": specifier}}}


def _by_script(script: str, mesh: str) -> Json:
    source = {"source_code": {"inline_string": script}}
    return {"@type": f"{_TYPE}extensions.router.cluster_specifiers.lua.v3.LuaConfig", "default_cluster": mesh, **source}


def _by_table(header: str, carrier: Carrier, names: Sequence[str]) -> Json:
    kind = f"{_TYPE}extensions.router.cluster_specifiers.matcher.v3"
    prefix = name_prefix(carrier, from_peers=False)

    def to(cluster: str) -> Json:
        return {"action": {"name": "cluster", "typed_config": {"@type": f"{kind}.ClusterAction", "cluster": cluster}}}

    header_input = {"@type": f"{_TYPE}type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": header}
    tree = {
        "input": {"name": "model", "typed_config": header_input},
        "exact_match_map": {"map": {name: to(f"{prefix}/{name}") for name in names}},
    }
    matcher = {"matcher_tree": tree, "on_no_match": to(mesh_cluster(carrier))}
    return {"@type": f"{kind}.MatcherClusterSpecifier", "cluster_matcher": matcher}


def _lua(script: str) -> Json:
    source = {"source_code": {"inline_string": script}}
    return {LUA_FILTER: {"@type": f"{_TYPE}extensions.filters.http.lua.v3.LuaPerRoute", **source}}


def _to_mesh(carrier: Carrier, match: Json) -> Json:
    route: Json = {"match": match, "route": {"cluster": mesh_cluster(carrier), "retry_policy": {}, **_NO_TIMEOUT}}
    if carrier is Carrier.HTTP:
        route["typed_per_filter_config"] = dict.fromkeys(BODY_FILTERS, _DISABLED)
    return route


_NO_TIMEOUT = {"timeout": "0s", "idle_timeout": "0s"}
# The next tier takes a call that was refused, after a pause, which cannot be 0.
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
