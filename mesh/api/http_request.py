"""Reads the secrets and the target of an HTTP request."""

from aiohttp import web

from mesh.access.guard import bearer_secret


def http_secrets(request: web.Request) -> tuple[str, str]:
    """Return the bearer key and that of `x-api-key`, which Anthropic's clients send; an empty text for one that is missing."""
    return bearer_secret(request.headers.get("Authorization", "")), request.headers.get("x-api-key", "")


def target_of(request: web.Request) -> str:
    """Return the path and the query as they were sent, without the address that a client may put before them (`GET http://host/path`)."""
    return request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
