"""Resolves a registration to a local path or to a Source that can fetch its files."""

import base64
import json
import re
import ssl
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, LoadFailed, RepertoryError
from runtime.puller.source import Source
from runtime.puller.sources.azure import AzureContainer
from runtime.puller.sources.destinations import Destinations
from runtime.puller.sources.gcs import GcsBucket
from runtime.puller.sources.http_client import HttpClient
from runtime.puller.sources.http_source import WebSource
from runtime.puller.sources.huggingface import HubSource
from runtime.puller.sources.local_path import local_path, volume_path
from runtime.puller.sources.object_store import Bucket, BucketSource
from runtime.puller.sources.s3 import S3Bucket
from runtime.puller.sources.storage_config import storage_options
from runtime.types import ModelSource

SCHEMES = ("hf", "s3", "gs", "az", "http", "https", "pvc", "file")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")


def locate(source: ModelSource, config: RuntimeConfig) -> Path | Source:
    """Return the place of a model's files. Raises InvalidRequest for a URI of no known form, LoadFailed for a local path that does not exist."""
    scheme, separator, rest = source.uri.partition("://")
    if separator and scheme not in SCHEMES:
        raise InvalidRequest(
            f"{scheme}:// is not known; known are {', '.join(name + '://' for name in SCHEMES)}", param="modelPath"
        )
    if not separator and (source.storage_key is not None or "type" in source.storage_params):
        return _from_storage(source, config)
    destinations = Destinations.parse(config.source_hosts)
    options: Mapping[str, str] = {}
    if separator:
        storage = storage_options(
            config.storage_config_dir, source.storage_key, source.storage_params, source.uri, destinations=destinations
        )
        options, destinations = storage.values, destinations.trusting(*storage.trusted_hosts)
    match scheme if separator else "":
        case "":
            return local_path(source.uri, config.model_roots)
        case "file":
            parts = _split(source.uri)
            if parts.netloc not in ("", "localhost"):
                raise InvalidRequest(
                    f"{source.uri}: file:// takes three slashes and a path on this machine", param="modelPath"
                )
            return local_path(urllib.parse.unquote(parts.path), config.model_roots)
        case "pvc":
            volume, _, path = rest.partition("/")
            return volume_path(volume, path, config.pvc_dir)
        case "hf":
            return HubSource(rest, options.get("token"), allow_pickle=config.allow_pickle, destinations=destinations)
        case "http" | "https":
            return _web(source.uri, "", options, destinations)
        case "az":
            account, _, path = rest.partition("/")
            container, _, prefix = path.partition("/")
            return _azure(source.uri, account, container, prefix, options, config)
        case _:
            bucket, _, prefix = rest.partition("/")
            return _bucket(source.uri, S3Bucket if scheme == "s3" else GcsBucket, bucket, prefix, options, config)


def _from_storage(source: ModelSource, config: RuntimeConfig) -> Path | Source:
    destinations = Destinations.parse(config.source_hosts)
    storage = storage_options(
        config.storage_config_dir, source.storage_key, source.storage_params, destinations=destinations
    )
    options = storage.values
    kind = options.get("type")
    path = source.uri
    match kind:
        case "pvc":
            return volume_path(options.get("name", ""), path, config.pvc_dir)
        case "http" | "https":
            _need("storage of type http", url=options.get("url", ""))
            return _web(options["url"], path, options, destinations.trusting(*storage.trusted_hosts))
        case "s3":
            return _bucket("storage of type s3", S3Bucket, options.get("bucket", ""), path, options, config)
        case "gcs" | "gs":
            return _bucket("storage of type gcs", GcsBucket, options.get("bucket", ""), path, options, config)
        case "azure" | "az":
            account, container = options.get("account_name", ""), options.get("container", "")
            return _azure("storage of type azure", account, container, path, options, config)
        case _:
            raise InvalidRequest(
                f"storage type {kind!r} is not known; known are s3, gcs, azure, http, pvc", param="storage_params"
            )


def _azure(
    where: str, account: str, container: str, prefix: str, options: Mapping[str, str], config: RuntimeConfig
) -> Source:
    _need(where, account_name=account, container=container)
    return _bucket(where, partial(AzureContainer, account), container, prefix, options, config)


def _bucket(
    where: str,
    kind: Callable[[str, Mapping[str, str]], Bucket],
    bucket: str,
    prefix: str,
    options: Mapping[str, str],
    config: RuntimeConfig,
) -> Source:
    _need(where, bucket=bucket)
    try:
        return BucketSource(kind(bucket, options), prefix, allow_pickle=config.allow_pickle)
    except RepertoryError:
        raise
    except Exception as error:
        # The library's message may quote a secret, so only its type is shown.
        given = ", ".join(sorted(options)) or "none"
        raise LoadFailed(
            f"{where}: the storage options cannot be used ({type(error).__name__}); given are {given}"
        ) from None


def _web(url: str, path: str, options: Mapping[str, str], destinations: Destinations) -> WebSource:
    """Resolve a URL. `path` goes between its own path and its query; a user and password before the host become a header."""
    parts = _split(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(
            f"{parts.scheme or 'no scheme'}://{host}: an http:// or https:// URL with a host is needed",
            param="modelPath",
        )
    headers = _headers(options)
    if parts.username is not None and not any(name.lower() == "authorization" for name in headers):
        words = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
    joined = f"{parts.path.rstrip('/')}/{path.lstrip('/')}" if path else parts.path
    quoted = urllib.parse.quote(joined, safe="/%~!$&'()*+,;=:@")
    return WebSource(
        urllib.parse.urlunsplit((parts.scheme, host, quoted, parts.query, "")),
        HttpClient(headers, _certificates(options), destinations),
    )


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 — raises unless it is a number
        if parts.hostname:
            parts.hostname.encode("idna")
    except ValueError:
        raise InvalidRequest(f"{url.partition('?')[0].rpartition('@')[2]!r} is not a URL", param="modelPath") from None
    return parts


def _headers(options: Mapping[str, str]) -> dict[str, str]:
    if "headers" not in options:
        return {}
    try:
        found = {
            str(name): value if isinstance(value, str) else str(value[0])
            for name, value in json.loads(options["headers"]).items()
        }
    except (ValueError, AttributeError, IndexError, TypeError, RecursionError):
        raise InvalidRequest(
            "storage parameter headers must be a JSON object of names and values", param="storage_params"
        ) from None
    # A secret that was read from a file ends with a line break.
    headers = {name: value.strip() for name, value in found.items()}
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidRequest(
                f"storage parameter headers: {name[:100]!r} has a name or a value that no header can have",
                param="storage_params",
            )
    return headers


def _certificates(options: Mapping[str, str]) -> ssl.SSLContext | None:
    if "certificate" not in options and "client_certificate" not in options:
        return None
    try:
        context = ssl.create_default_context(cadata=options.get("certificate"))
        if "client_certificate" in options:
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:  # the library reads a chain from files only
                pem.write(options["client_certificate"] + "\n" + options.get("client_key", ""))
                pem.flush()
                context.load_cert_chain(pem.name)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequest(
            f"storage parameters certificate, client_certificate and client_key must be PEM ({type(error).__name__})",
            param="storage_params",
        ) from None
    return context


def _need(where: str, **given: str) -> None:
    for name, value in given.items():
        if not value:
            raise InvalidRequest(f"{where}: the {name} is missing", param="modelPath")
