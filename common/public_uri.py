"""Shortens the URI of a model's files to what callers without the right to management may see."""

from urllib.parse import urlsplit, urlunsplit


def public_uri(uri: str) -> str:
    """Return a URI without user information, query and fragment, each of which may hold a secret. Paths are returned as they are."""
    if "://" not in uri:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
