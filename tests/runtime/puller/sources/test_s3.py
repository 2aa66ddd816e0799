"""S3 as its own library speaks it, against a server that imitates the service."""

import base64
import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import SSLError
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from common.model_key import ModelSettings
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.sources.s3 import S3Bucket, whole_sha256
from runtime.types import ModelSource
from tests.support.http_server import HttpServer
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import OPEN
from tests.support.tls import make_identity

COMPOSITE = {"ChecksumType": "COMPOSITE"}


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


async def test_s3_loads_from_a_bucket(endpoint: str, tmp_path: Path) -> None:
    keys = {"access_key_id": "id", "secret_access_key": "SECRET", "endpoint_url": endpoint, "region": "us-east-1"}
    client = boto3.client(
        "s3", aws_access_key_id="id", aws_secret_access_key="SECRET", endpoint_url=endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="models")
    tiny_llama(tmp_path / "m", shard="100KB")
    for file in (tmp_path / "m").iterdir():
        client.upload_file(str(file), "models", f"org/tiny/{file.name}")
    for number in range(1100):  # more than a page of a neighbour's
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("models", f"org/tiny/notes/{number:04}", b"x")
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    source = ModelSource("s3://models/org/tiny", None, keys)
    prepared = await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    assert all(same(Path(name), tmp_path / "m" / Path(name).name) for name in prepared.checkpoint.weight_files)
    look = await preparation.look(
        ModelSource("org/tiny", None, {"type": "s3", "bucket": "models", **keys}), ModelSettings(), "cpu"
    )
    assert look.needs.weight_bytes == prepared.checkpoint.weight_bytes
    with pytest.raises(LoadFailed, match="s3://absent") as caught:
        await preparation.prepare(
            ModelSource("s3://absent/m", None, keys), ModelSettings(), "cpu", lambda progress: None
        )
    assert "SECRET" not in str(caught.value)
    preparation.close()


@pytest.mark.parametrize("encryption", ["aws:kms", "AES256"])
async def test_s3_ignores_the_tag_of_an_encrypted_object(endpoint: str, tmp_path: Path, encryption: str) -> None:
    keys = {"access_key_id": "id", "secret_access_key": "SECRET", "endpoint_url": endpoint, "region": "us-east-1"}
    client = boto3.client(
        "s3", aws_access_key_id="id", aws_secret_access_key="SECRET", endpoint_url=endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="models")
    tiny_llama(tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        client.put_object(
            Bucket="models", Key=f"m/{file.name}", Body=file.read_bytes(), ServerSideEncryption=encryption
        )
    # the service's own tag would be of no content
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["models"].keys[
        "m/config.json"
    ]._etag = "0123456789abcdef0123456789abcdef"
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    source = ModelSource("s3://models/m", None, keys)
    if encryption == "AES256":
        with pytest.raises(LoadFailed, match=r"config\.json is corrupt: its md5"):
            await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
    else:
        prepared = await preparation.prepare(source, ModelSettings(), "cpu", lambda progress: None)
        assert same(Path(prepared.checkpoint.model_dir) / "config.json", tmp_path / "m" / "config.json")
    preparation.close()


def test_s3_verifies_the_stored_checksum(endpoint: str) -> None:
    keys = {"access_key_id": "id", "secret_access_key": "SECRET", "endpoint_url": endpoint, "region": "us-east-1"}
    client = boto3.client(
        "s3", aws_access_key_id="id", aws_secret_access_key="SECRET", endpoint_url=endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="sums")
    client.put_object(Bucket="sums", Key="f", Body=b"data", ChecksumAlgorithm="SHA256")
    bucket = S3Bucket("sums", keys)
    (file,) = bucket.list("")
    assert (file.sha256, file.md5) == ("", "")
    assert bucket.checkable(file).sha256 == hashlib.sha256(b"data").hexdigest()
    assert bucket.checkable(file).md5 == hashlib.md5(b"data").hexdigest()


@pytest.mark.parametrize(
    ("suffix", "kind", "is_whole"),
    [("", {}, True), ("", {"ChecksumType": "FULL_OBJECT"}, True), ("-2", {}, False), ("-2", COMPOSITE, False)],
)
def test_whole_sha256_ignores_a_checksum_of_parts(suffix: str, kind: dict[str, str], is_whole: bool) -> None:
    digest = hashlib.sha256(b"data")
    head = {"ChecksumSHA256": base64.b64encode(digest.digest()).decode() + suffix, **kind}
    assert whole_sha256(head) == (digest.hexdigest() if is_whole else "")
    assert whole_sha256({}) == ""


class _Empty(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_s3_accepts_a_private_authority(tmp_path: Path) -> None:
    make_identity(tmp_path)
    server = HttpServer(_Empty, tmp_path / "identity.pem")
    options = {"access_key_id": "id", "secret_access_key": "SECRET", "endpoint_url": server.url, "region": "us-east-1"}
    authority = tmp_path / "authority.pem"
    try:
        for given in ({"certificate": authority.read_text()}, {"ca_bundle": str(authority)}):
            assert list(S3Bucket("models", {**options, **given}).list("")) == []
        with pytest.raises(SSLError):
            list(S3Bucket("models", options).list(""))
    finally:
        server.close()
