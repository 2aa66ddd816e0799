"""Amazon's S3, and what speaks like it, through boto3. Knows listing, ranges and credentials; imports the library only when it is used."""

from collections.abc import Iterator, Mapping

from runtime.puller.buckets import missing_extra
from runtime.puller.source import RemoteFile


class S3Bucket:
    """boto3's own chain of credentials, unless the options carry some. Options in ModelMesh's words."""

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

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        end = start + count - 1
        answer = self._client.get_object(Bucket=self._bucket, Key=file.location, Range=f"bytes={start}-{end}", IfMatch=f'"{file.digest}"')
        return bytes(answer["Body"].read())
