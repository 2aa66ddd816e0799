"""Reads ModelMesh's storage configuration, a directory with one JSON file per key that is mounted from a secret, and overlays a request's parameters.

The result may hold secrets: it is used and dropped, never logged, stored or sent.
"""

import json
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed

_KINDS = {"gs": "gcs", "az": "azure", "https": "http"}
_BEARERS = ("gcs", "azure")  # Their requests carry a bearer token.
# Destination fields. A registration may not override them, or it could send the configuration's credentials elsewhere.
_PLACES = ("url", "endpoint_url", "token_uri", "verify_ssl", "ca_bundle")
_OPEN = frozenset(
    {
        "type",
        "bucket",
        "region",
        "default_region",
        "container",
        "account_name",
        "name",
        "project_id",
        "anonymous",
        "certificate",
        *_PLACES,
    }
)


def storage_options(
    config_dir: str, storage_key: str | None, params: Mapping[str, str], uri: str = ""
) -> dict[str, str]:
    """Return the named configuration overlaid with `params`. Without a key it is `default_<type>` or `default`, if present.

    A configuration of another type, or for another web site than the registered `uri`, is not used. Raises InvalidRequest for a key that is not a
    name or does not fit the URI, LoadFailed for a key without configuration.
    """
    options: dict[str, str] = {}
    scheme, separator, _ = uri.partition("://")
    given = scheme if separator else params.get("type", "")
    kind = _KINDS.get(given, given)
    if storage_key is not None:
        if not storage_key or "/" in storage_key or storage_key.startswith("."):
            raise InvalidRequest(f"storage_key {storage_key!r} is not a name", param="storage_key")
        if not config_dir:
            raise LoadFailed(f"storage key {storage_key!r} is given, and the runtime has no storage_config_dir")
        path = Path(config_dir) / storage_key
        if not path.is_file():
            raise LoadFailed(f"Did not find storage config for key {storage_key}")
        options = _read(path)
    elif config_dir:
        for name in (f"default_{given}", f"default_{kind}", "default"):
            if "/" not in name and (Path(config_dir) / name).is_file():
                options = _read(Path(config_dir) / name)
                break
    strange = _strange(options, kind, uri) if separator else ""
    if strange and storage_key is not None:
        raise InvalidRequest(f"{uri}: storage key {storage_key!r} is {strange}", param="storage_key")
    if strange:
        options = {}
    moved = [name for name in _PLACES if name in params and params[name] != options.get(name)]
    if moved and not options.keys() <= _OPEN:
        whose = f"storage key {storage_key!r}" if storage_key is not None else "the default storage configuration"
        raise InvalidRequest(
            f"storage_params can't change {moved[0]} of {whose}: its credentials would go there", param="storage_params"
        )
    merged = {**options, **params}
    kind = kind or _KINDS.get(merged.get("type", ""), merged.get("type", ""))
    if kind in _BEARERS and "endpoint_url" in moved:
        merged["anonymous"] = "true"  # The machine's own identity must not go to an endpoint that a registration names.
    return merged


def _strange(options: Mapping[str, str], kind: str, uri: str) -> str:
    """Return why a configuration does not fit this URI; empty if it does."""
    own = options.get("type", kind)
    if _KINDS.get(own, own) != kind:
        return f"of type {own}"
    if kind == "http" and "headers" in options and "url" not in options:
        return "without the url that its headers are for"
    if kind == "http" and "url" in options and _site(options["url"]) != _site(uri):
        return "for another site"
    return ""


def _site(url: str) -> tuple[str, str]:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "", url
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text())
        return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError):
        # the cause may quote the content, which is secret
        raise LoadFailed(f"storage config {path.name!r} is not a readable JSON object") from None
