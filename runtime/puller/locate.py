"""From what a registration says to where the files are: a path here, or a Source that can bring them. Knows every scheme; talks to none."""

import json
import ssl
import tempfile
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from runtime.config import RuntimeConfig
from runtime.errors import InvalidRequest
from runtime.puller.azure import AzureContainer
from runtime.puller.buckets import BucketSource
from runtime.puller.fetch import HttpClient
from runtime.puller.gcs import GcsBucket
from runtime.puller.hub import HubSource
from runtime.puller.local import local_path, volume_path
from runtime.puller.s3 import S3Bucket
from runtime.puller.source import Source
from runtime.puller.storage import storage_options
from runtime.puller.web import WebSource
from runtime.types import ModelSource

SCHEMES = ("hf", "s3", "gs", "az", "http", "https", "pvc", "file")


def locate(source: ModelSource, config: RuntimeConfig) -> Path | Source:
    """Raises InvalidRequest for what can't be a place, LoadFailed for a local place that isn't there."""
    scheme, separator, rest = source.uri.partition("://")
    if separator and scheme not in SCHEMES:
        raise InvalidRequest(f"{scheme}:// is not known; known are {', '.join(name + '://' for name in SCHEMES)}", param="modelPath")
    if not separator and (source.storage_key is not None or "type" in source.storage_params):
        return _from_storage(source, config)
    options = storage_options(config.storage_config_dir, source.storage_key, source.storage_params) if separator else {}
    match scheme if separator else "":
        case "":
            return local_path(source.uri, config.model_roots)
        case "file":
            parts = urllib.parse.urlsplit(source.uri)
            if parts.netloc not in ("", "localhost"):
                raise InvalidRequest(f"{source.uri}: file:// takes three slashes and a path on this machine", param="modelPath")
            return local_path(urllib.parse.unquote(parts.path), config.model_roots)
        case "pvc":
            volume, _, path = rest.partition("/")
            return volume_path(volume, path, config.pvc_dir)
        case "hf":
            return HubSource(rest, options.get("token"), allow_pickle=config.allow_pickle)
        case "http" | "https":
            return WebSource(source.uri, _client(options))
        case "az":
            account, _, path = rest.partition("/")
            container, _, prefix = path.partition("/")
            _need(source.uri, account=account, container=container)
            return BucketSource(AzureContainer(account, container, options), prefix, allow_pickle=config.allow_pickle)
        case _:
            bucket, _, prefix = rest.partition("/")
            _need(source.uri, bucket=bucket)
            kind = S3Bucket if scheme == "s3" else GcsBucket
            return BucketSource(kind(bucket, options), prefix, allow_pickle=config.allow_pickle)


def _from_storage(source: ModelSource, config: RuntimeConfig) -> Path | Source:
    options = storage_options(config.storage_config_dir, source.storage_key, source.storage_params)
    kind = options.get("type")
    path = source.uri
    match kind:
        case "pvc":
            return volume_path(options.get("name", ""), path, config.pvc_dir)
        case "http" | "https":
            _need("storage of type http", url=options.get("url", ""))
            return WebSource(f"{options['url'].rstrip('/')}/{path.lstrip('/')}", _client(options))
        case "s3":
            _need("storage of type s3", bucket=options.get("bucket", ""))
            return BucketSource(S3Bucket(options["bucket"], options), path, allow_pickle=config.allow_pickle)
        case "gcs" | "gs":
            _need("storage of type gcs", bucket=options.get("bucket", ""))
            return BucketSource(GcsBucket(options["bucket"], options), path, allow_pickle=config.allow_pickle)
        case "azure" | "az":
            _need("storage of type azure", account_name=options.get("account_name", ""), container=options.get("container", ""))
            container = AzureContainer(options["account_name"], options["container"], options)
            return BucketSource(container, path, allow_pickle=config.allow_pickle)
        case _:
            raise InvalidRequest(f"storage type {kind!r} is not known; known are s3, gcs, azure, http, pvc", param="storage_params")


def _client(options: Mapping[str, str]) -> HttpClient:
    headers: dict[str, str] = {}
    if "headers" in options:
        try:
            headers = {str(name): value if isinstance(value, str) else str(value[0]) for name, value in json.loads(options["headers"]).items()}
        except (ValueError, AttributeError, IndexError, TypeError):
            raise InvalidRequest("storage parameter headers must be a JSON object of names and values", param="storage_params") from None
    context: ssl.SSLContext | None = None
    if "certificate" in options or "client_certificate" in options:
        context = ssl.create_default_context(cadata=options.get("certificate"))
        if "client_certificate" in options:
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:     # the library reads a chain from files only
                pem.write(options["client_certificate"] + "\n" + options.get("client_key", ""))
                pem.flush()
                context.load_cert_chain(pem.name)
    return HttpClient(headers, context)


def _need(where: str, **given: str) -> None:
    for name, value in given.items():
        if not value:
            raise InvalidRequest(f"{where}: the {name} is missing", param="modelPath")
