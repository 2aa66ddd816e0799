"""Reads the secrets that an HTTP request carries."""

from aiohttp import web

from mesh.access.guard import bearer_secret


def http_secrets(request: web.Request) -> tuple[str, str]:
    """Return the bearer key and that of `x-api-key`, which Anthropic's clients send; an empty text for one that is missing."""
    return bearer_secret(request.headers.get("Authorization", "")), request.headers.get("x-api-key", "")
