"""ModelMesh's storage configuration: a directory with one JSON file per key, mounted from a secret, and a registration's parameters over it.

The options that this module returns may hold secrets. They are never logged, stored or sent anywhere but to the store.
"""

import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.sources.destinations import Destinations

_KINDS = {"gs": "gcs", "az": "azure", "https": "http"}
_BEARER_KINDS = ("gcs", "azure")  # stores whose requests carry a token that anyone who receives it can use
# Destination fields. A registration may not override them, or the configuration's credentials could be exfiltrated.
_DESTINATIONS = ("url", "endpoint_url", "token_uri", "verify_ssl", "ca_bundle")
_URLS = ("url", "endpoint_url", "token_uri")
_AZURE_SUFFIX = "core.windows.net"
_PUBLIC = frozenset(
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
        *_DESTINATIONS,
    }
)


@dataclass(frozen=True, slots=True)
class _Configuration:
    """`label` names the configuration in messages; the options are empty if none applies."""

    label: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_credentials(self) -> bool:
        return not self.options.keys() <= _PUBLIC


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """`trusted_hosts`: the hosts that the operator's configuration names as destinations."""

    values: Mapping[str, str]
    trusted_hosts: frozenset[str]


def storage_options(
    config_dir: str,
    storage_key: str | None,
    params: Mapping[str, str],
    uri: str = "",
    *,
    destinations: Destinations,
) -> StorageOptions:
    """Return the options of the named configuration with `params` over them.

    Without a key, the configuration is `default_<type>` or `default`, if there is one. `uri` is the registered one: a default of another
    type or for another web site is not used for it, and a named one is an error. Raises InvalidRequest for an invalid or unsuitable key
    and for parameters that redirect credentials or lead to a host outside `destinations`, LoadFailed for a key without a configuration.
    """
    scheme, has_scheme, _ = uri.partition("://")
    given = scheme if has_scheme else params.get("type", "")
    kind = _KINDS.get(given, given)
    configuration = _named(config_dir, storage_key) if storage_key is not None else _default(config_dir, given, kind)
    if has_scheme and (mismatch := _mismatch(configuration.options, kind, uri)):
        if storage_key is not None:
            raise InvalidRequest(f"{uri}: {configuration.label} is {mismatch}", param="storage_key")
        configuration = _Configuration(configuration.label)
    redirected = [name for name in _DESTINATIONS if name in params and params[name] != configuration.options.get(name)]
    if redirected and configuration.has_credentials:
        raise InvalidRequest(
            f"storage_params cannot change {redirected[0]} of {configuration.label}: its credentials would go there",
            param="storage_params",
        )
    _check_destinations(params, redirected, destinations)
    merged = {**configuration.options, **params}
    kind = kind or _KINDS.get(merged.get("type", ""), merged.get("type", ""))
    if kind in _BEARER_KINDS and "endpoint_url" in redirected:
        merged["anonymous"] = "true"  # The machine's own identity must not go to a registration's endpoint either.
    trusted = frozenset(_host(configuration.options[name]) for name in _URLS if name in configuration.options)
    return StorageOptions(merged, trusted)


def _check_destinations(params: Mapping[str, str], redirected: Sequence[str], destinations: Destinations) -> None:
    """Raise InvalidRequest if a registration's own parameters name a host or a file of this machine that the operator has not allowed.

    `url` is left to the HTTP client, which checks the address that it connects to. The stores' libraries open their own connections.
    """
    if "ca_bundle" in redirected:
        raise InvalidRequest(
            "ca_bundle names a file of the runtime's machine: put it into a storage configuration file, or give the PEM text as certificate",
            param="storage_params",
        )
    for name in ("endpoint_url", "token_uri"):
        if name in redirected:
            destinations.require_listed(_host(params[name]), name)
    for host in _hosts_of_connection_string(params.get("connection_string", "")):
        destinations.require_listed(host, "connection_string")


def _hosts_of_connection_string(text: str) -> Iterator[str]:
    """Yield the hosts that an Azure connection string leads to other than Azure's own."""
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if name.strip().lower().endswith("endpoint"):
            yield _host(value)
        elif name.strip().lower() == "endpointsuffix" and value.strip() != _AZURE_SUFFIX:
            yield value.strip()
        elif name.strip().lower() == "usedevelopmentstorage":
            yield "localhost"


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""


def _named(config_dir: str, storage_key: str) -> _Configuration:
    if not storage_key or "/" in storage_key or storage_key.startswith("."):
        raise InvalidRequest(f"storage_key {storage_key!r} is not a name", param="storage_key")
    if not config_dir:
        raise LoadFailed(f"storage key {storage_key!r} is given, and the runtime has no storage_config_dir")
    path = Path(config_dir) / storage_key
    if not path.is_file():
        raise LoadFailed(f"Did not find storage config for key {storage_key}")
    return _Configuration(f"storage key {storage_key!r}", _read(path))


def _default(config_dir: str, given: str, kind: str) -> _Configuration:
    label = "the default storage configuration"
    if config_dir:
        for name in (f"default_{given}", f"default_{kind}", "default"):
            if "/" not in name and (Path(config_dir) / name).is_file():
                return _Configuration(label, _read(Path(config_dir) / name))
    return _Configuration(label)


def _mismatch(options: Mapping[str, str], kind: str, uri: str) -> str:
    """Return why a configuration does not apply to this URI; empty if it does."""
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
        # The cause may quote the content, which is secret.
        raise LoadFailed(f"storage config {path.name!r} is not a readable JSON object") from None
