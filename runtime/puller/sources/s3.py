"""Lists and reads objects of S3 and compatible stores through boto3."""

import base64
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runtime.puller.source import RemoteFile
from runtime.puller.sources.object_store import missing_extra

_CONNECT_S = 10
_TRIES = 3


class S3Bucket:
    """boto3's own chain of credentials, unless the options carry some. Options in ModelMesh's and KServe's words; `certificate`: PEM of who signed the
    server's, `ca_bundle`: a file of them."""

    def __init__(self, bucket: str, options: Mapping[str, str]) -> None:
        try:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config
            from botocore.exceptions import HTTPClientError
        except ImportError as error:
            raise missing_extra("s3", "boto3") from error
        self.origin = f"s3://{bucket}"
        self.away: tuple[type[Exception], ...] = (HTTPClientError,)
        self._bucket = bucket
        # a place that swallows what is sent to it must not hold up what was pulled before for minutes
        patience: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "retries": {"max_attempts": _TRIES, "mode": "standard"},
        }
        config = Config(**patience, s3={"addressing_style": "path"} if "endpoint_url" in options else {})
        if options.get("anonymous", "").lower() in ("1", "true", "yes"):
            config = config.merge(Config(signature_version=UNSIGNED))
        verify: dict[str, Any] = {}
        if "certificate" in options:
            self._authority = tempfile.NamedTemporaryFile("w", suffix=".pem")  # noqa: SIM115 — the library reads it at each connection
            self._authority.write(options["certificate"])
            self._authority.flush()
            verify["verify"] = self._authority.name
        elif "ca_bundle" in options:
            verify["verify"] = options["ca_bundle"]
        elif options.get("verify_ssl", "").lower() in ("0", "false", "no"):
            verify["verify"] = False
        self._client = boto3.client(
            "s3",
            aws_access_key_id=options.get("access_key_id"),
            aws_secret_access_key=options.get("secret_access_key"),
            endpoint_url=options.get("endpoint_url"),
            region_name=options.get("region") or options.get("default_region"),
            config=config,
            **verify,
        )

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                yield RemoteFile(item["Key"], item["Key"], item["Size"], item["ETag"].strip('"'))

    def checkable(self, file: RemoteFile) -> RemoteFile:
        """Return the file with the digests that can be checked. The ETag of an upload in parts, or of one with a customer's encryption key, is not an MD5."""
        head = self._client.head_object(
            Bucket=self._bucket, Key=file.location, ChecksumMode="ENABLED", IfMatch=f'"{file.digest}"'
        )
        plain = head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head
        whole = len(file.digest) == 32 and "-" not in file.digest
        return replace(file, sha256=whole_sha256(head), md5=file.digest if plain and whole else "")

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        end = start + count - 1
        answer = self._client.get_object(
            Bucket=self._bucket, Key=file.location, Range=f"bytes={start}-{end}", IfMatch=f'"{file.digest}"'
        )
        return bytes(answer["Body"].read())


def whole_sha256(head: Mapping[str, str]) -> str:
    """Return the SHA-256 of an object, in hexadecimal; empty if the service knows only that of its parts' sums."""
    sha256 = head.get("ChecksumSHA256", "")
    # Servers that send no type write the number of parts behind the sum.
    if "-" in sha256 or head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return ""
    return base64.b64decode(sha256).hex()
