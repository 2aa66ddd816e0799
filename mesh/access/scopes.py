"""Decides which right each HTTP route and each gRPC method needs.

Routes are classified by their pattern, not by the path that a caller sends, so that no spelling of a path changes the right that it needs.
What is not listed needs the right to inference.
"""

from enum import StrEnum


class Scope(StrEnum):
    INFERENCE = "inference"
    MANAGEMENT = "management"
    METRICS = "metrics"


Scopes = frozenset[Scope]
"""Any one of these rights is enough; an empty set stands for what every caller may use."""

OPEN: Scopes = frozenset()
INFERENCE: Scopes = frozenset({Scope.INFERENCE})
MANAGEMENT: Scopes = frozenset({Scope.MANAGEMENT})
METRICS: Scopes = frozenset({Scope.METRICS})
LISTING: Scopes = frozenset({Scope.INFERENCE, Scope.MANAGEMENT})
ANY: Scopes = frozenset(Scope)

_OPEN_ROUTES = frozenset({"/health", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
_LISTING_ROUTES = frozenset(
    {
        "/v1/models",
        "/v1/models/{name}",
        "/models",
        "/models/sse",
        "/v2",
        "/v2/repository/index",
        "/api/tags",
        "/api/ps",
        "/api/show",
        "/api/version",
        "/openapi.json",
    }
)
_READING = ("GET", "HEAD")
_MANAGEMENT_ROUTES = (
    "/admin/",
    "/models/load",
    "/models/unload",
    "/v2/repository/models/",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)

# By their full names: a prefix would also open what the pass-through forwards.
_OPEN_METHODS = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
_MANAGEMENT_SERVICES = ("/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/")


def http_scopes(method: str, route: str | None) -> Scopes:
    """Return the rights for a method and a route's pattern such as `/v1/models/{name}`; None for a path without a route."""
    if route is None:
        return ANY
    if route in _OPEN_ROUTES or (route == "/" and method in _READING):
        return OPEN
    if route == "/models" and method not in _READING:
        return MANAGEMENT
    if route == "/metrics":
        return METRICS
    if route in _LISTING_ROUTES:
        return LISTING
    return MANAGEMENT if route.startswith(_MANAGEMENT_ROUTES) else INFERENCE


def grpc_scopes(method: str) -> Scopes:
    """Return the rights for a method, `/package.Service/Method`."""
    if method in _OPEN_METHODS:
        return OPEN
    return MANAGEMENT if method.startswith(_MANAGEMENT_SERVICES) else INFERENCE
