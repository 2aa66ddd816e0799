"""Lists and reads objects of Google Cloud Storage through google-cloud-storage."""

import base64
import os
from collections.abc import Iterator, Mapping

from runtime.puller.source import RemoteFile
from runtime.puller.sources.object_store import missing_extra

_PATIENCE_S = 30.0
_TOKEN_URI = "https://oauth2.googleapis.com/token"


class GcsBucket:
    """`options`: those of a service account's key file, or else the machine's own credentials, or none. `endpoint_url`: another server."""

    def __init__(self, bucket: str, options: Mapping[str, str]) -> None:
        try:
            from google.api_core.exceptions import RetryError, ServerError
            from google.auth.credentials import AnonymousCredentials
            from google.auth.exceptions import DefaultCredentialsError, InvalidOperation, TransportError
            from google.cloud import storage
            from google.cloud.storage.retry import DEFAULT_RETRY
            from requests.exceptions import ConnectionError as NoConnection
            from requests.exceptions import Timeout
        except ImportError as error:
            raise missing_extra("gcs", "google-cloud-storage") from error
        # a label for traces: the library would ask for the bucket itself, which a reader may have no right to, in a thread that outlives the pull
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        self.origin = f"gs://{bucket}"
        self.away: tuple[type[Exception], ...] = (RetryError, ServerError, TransportError, NoConnection, Timeout)
        self._no_credentials = InvalidOperation
        self._retry = DEFAULT_RETRY.with_timeout(_PATIENCE_S)
        project = options.get("project_id")
        endpoint = {"api_endpoint": options["endpoint_url"]} if "endpoint_url" in options else None
        if "private_key" in options:
            info = {"type": "service_account", "token_uri": _TOKEN_URI, **options}
            client = storage.Client.from_service_account_info(info, client_options=endpoint)
        elif options.get("anonymous", "").lower() in ("1", "true", "yes"):
            client = storage.Client(project=project, credentials=AnonymousCredentials(), client_options=endpoint)
        else:
            try:
                client = storage.Client(project=project, client_options=endpoint)
            except DefaultCredentialsError:  # public buckets are still readable
                client = storage.Client(project=project, credentials=AnonymousCredentials(), client_options=endpoint)
        self._bucket = client.bucket(bucket)

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        try:
            for blob in self._bucket.list_blobs(prefix=prefix, retry=self._retry):
                # one that was put together of parts has no MD5
                md5, crc32c = (base64.b64decode(text).hex() if text else "" for text in (blob.md5_hash, blob.crc32c))
                yield RemoteFile(blob.name, blob.name, blob.size or 0, str(blob.generation), md5=md5, crc32c=crc32c)
        except self._no_credentials:
            # the library's words are of refreshing what there is not
            raise PermissionError("it is not public, and there are no credentials for it") from None

    def checkable(self, file: RemoteFile) -> RemoteFile:
        return file

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        blob = self._bucket.blob(file.location)
        # as it is stored, even if it was stored compressed
        return bytes(
            blob.download_as_bytes(
                start=start,
                end=start + count - 1,
                raw_download=True,
                if_generation_match=int(file.digest),
                checksum=None,
                retry=self._retry,
            )
        )
