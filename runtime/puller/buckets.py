"""Models in object stores: S3, Google Cloud Storage, Azure Blob. One thin adapter each over the store's own library, imported only when used.

An adapter lists and opens ranges; resuming, checking and choosing files is the same for all (BucketSource). Knows no configuration files.
"""

import base64
import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from runtime.errors import LoadFailed, RepertoryError
from runtime.puller.job import Job
from runtime.puller.source import Arrived, Listing, RemoteFile, checked_name, wanted

_CHUNK_BYTES = 8 * 1024 * 1024


class Bucket(Protocol):
    """`origin` names it to people."""

    origin: str

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        """Objects by full key in `name` and `location`."""

    def open(self, key: str, start: int, count: int) -> "IO[bytes] | Any":
        """Something to `read(n)` from, `count` bytes from `start`."""


class BucketSource:
    """The files below one prefix of a bucket; or one object, if the prefix is a .gguf file."""

    def __init__(self, bucket: Bucket, prefix: str, *, allow_pickle: bool) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._allow_pickle = allow_pickle

    def listing(self, job: Job) -> Listing:
        origin = f"{self._bucket.origin}/{self._prefix}"
        files: list[RemoteFile] = []
        with _told(origin, "listed"):
            for found in self._bucket.list(self._prefix):
                job.check()
                if found.name == self._prefix:
                    name = Path(found.name).name
                elif not self._prefix or found.name.startswith(f"{self._prefix}/"):
                    name = found.name[len(self._prefix) :].lstrip("/")
                else:
                    continue
                if name and not name.endswith("/") and found.size_bytes:
                    files.append(RemoteFile(checked_name(name, origin), found.location, found.size_bytes, found.digest, md5=found.md5))
        if not files:
            raise LoadFailed(f"{origin}: nothing is there")
        if len(files) == 1 and files[0].name.endswith(".gguf"):
            return Listing(origin, files)
        return Listing(origin, wanted(files, origin, allow_pickle=self._allow_pickle))

    def fetch(self, file: RemoteFile, target: Path, job: Job, arrived: Arrived) -> None:
        if target.exists():
            arrived(target.stat().st_size)
            return
        part = target.with_name(target.name + ".part")
        start = part.stat().st_size if part.exists() else 0
        if start > file.size_bytes:
            part.unlink()
            start = 0
        arrived(start)
        for attempt in range(4):
            try:
                with part.open("ab") as out:
                    while start < file.size_bytes:
                        job.check()
                        with _told(f"{self._bucket.origin}/{file.location}", "read"):
                            chunk = self._bucket.open(file.location, start, min(_CHUNK_BYTES, file.size_bytes - start)).read()
                        if not chunk:
                            raise LoadFailed(f"{self._bucket.origin}/{file.location}: ended after {start} of {file.size_bytes} bytes")
                        out.write(chunk)
                        start += len(chunk)
                        arrived(len(chunk))
                break
            except LoadFailed:
                if attempt == 3:
                    raise
                job.wait(0.5 * 2**attempt)
        if file.md5:
            digest = hashlib.md5(usedforsecurity=False)
            with part.open("rb") as content:
                while chunk := content.read(_CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != file.md5:
                part.unlink()
                raise LoadFailed(f"{file.name} is corrupt: its md5 is {digest.hexdigest()}, the source gives {file.md5}")
        part.rename(target)

    def read(self, file: RemoteFile, start: int, count: int, job: Job) -> bytes:
        with _told(f"{self._bucket.origin}/{file.location}", "read"):
            return bytes(self._bucket.open(file.location, start, count).read())


class S3Bucket:
    """boto3's own chain of credentials, unless the options carry some. Options in ModelMesh's words."""

    def __init__(self, bucket: str, options: "dict[str, str]") -> None:
        try:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config
        except ImportError as error:
            raise missing_extra("s3", "boto3") from error
        self.origin = f"s3://{bucket}"
        self._bucket = bucket
        config = Config(retries={"max_attempts": 5, "mode": "standard"}, s3={"addressing_style": "path"} if "endpoint_url" in options else {})
        if options.get("anonymous", "").lower() in ("1", "true", "yes"):
            config = config.merge(Config(signature_version=UNSIGNED))
        self._client = boto3.client(
            "s3",
            aws_access_key_id=options.get("access_key_id"),
            aws_secret_access_key=options.get("secret_access_key"),
            endpoint_url=options.get("endpoint_url"),
            region_name=options.get("region") or options.get("default_region"),
            config=config,
        )

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                tag = item["ETag"].strip('"')
                # an upload in parts has a tag that is no MD5
                yield RemoteFile(item["Key"], item["Key"], item["Size"], tag, md5=tag if len(tag) == 32 and "-" not in tag else "")

    def open(self, key: str, start: int, count: int) -> Any:
        return self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{start + count - 1}")["Body"]


class GcsBucket:
    def __init__(self, bucket: str, options: "dict[str, str]") -> None:
        try:
            from google.cloud import storage
        except ImportError as error:
            raise missing_extra("gcs", "google-cloud-storage") from error
        self.origin = f"gs://{bucket}"
        if "private_key" in options:
            info = {"type": "service_account", "token_uri": "https://oauth2.googleapis.com/token", **options}
            client = storage.Client.from_service_account_info(info)
        else:
            try:
                client = storage.Client()
            except Exception:      # no default credentials: public buckets are still readable
                client = storage.Client.create_anonymous_client()
        self._bucket = client.bucket(bucket)

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for blob in self._bucket.list_blobs(prefix=prefix):
            md5 = base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else ""
            yield RemoteFile(blob.name, blob.name, blob.size, str(blob.generation), md5=md5)

    def open(self, key: str, start: int, count: int) -> Any:
        return io.BytesIO(self._bucket.blob(key).download_as_bytes(start=start, end=start + count - 1))


class AzureContainer:
    def __init__(self, account: str, container: str, options: "dict[str, str]") -> None:
        try:
            from azure.storage.blob import ContainerClient
        except ImportError as error:
            raise missing_extra("azure", "azure-storage-blob") from error
        self.origin = f"az://{account}/{container}"
        url = options.get("endpoint_url") or f"https://{account}.blob.core.windows.net"
        if "connection_string" in options:
            self._client = ContainerClient.from_connection_string(options["connection_string"], container)
        else:
            self._client = ContainerClient(url, container, credential=_azure_credential(options))

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for blob in self._client.list_blobs(name_starts_with=prefix):
            md5 = blob.content_settings.content_md5
            yield RemoteFile(blob.name, blob.name, blob.size, blob.etag, md5=bytes(md5).hex() if md5 else "")

    def open(self, key: str, start: int, count: int) -> Any:
        return io.BytesIO(self._client.download_blob(key, offset=start, length=count).readall())


def _azure_credential(options: "dict[str, str]") -> Any:
    if "account_key" in options or "sas_token" in options:
        return options.get("account_key") or options["sas_token"]
    if "client_secret" in options:
        from azure.identity import ClientSecretCredential

        return ClientSecretCredential(options["tenant_id"], options["client_id"], options["client_secret"])
    return None


def missing_extra(extra: str, package: str) -> RepertoryError:
    return LoadFailed(f"reading from this store needs {package}: install repertory[{extra}]")


@contextlib.contextmanager
def _told(place: str, verb: str) -> Iterator[None]:
    """The libraries' many exceptions as one of ours, which names the place and no secret."""
    try:
        yield
    except RepertoryError:
        raise
    except Exception as error:
        raise LoadFailed(f"{place} can't be {verb}: {type(error).__name__}: {error}") from error
