"""Where a store's secrets go: to the place that they were given for, and into no message, whatever is wrong with them."""

import base64
import json
from pathlib import Path

import pytest

from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.progress import PullJob
from runtime.puller.source import RemoteFile
from runtime.puller.sources.http_client import HttpClient
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import ANYWHERE, OPEN, job, source_of
from tests.support.web import WebServer


@pytest.mark.parametrize(
    ("uri", "params"),
    [
        ("http://user:HIDDEN@127.0.0.1:1/m", {}),
        ("http://user:HIDDEN@[::1/m", {}),
        ("http://127.0.0.1:1/my model?sig=HIDDEN", {}),
        ("http://127.0.0.1:1/m?sig=HIDDEN SO", {}),
        ("http://127.0.0.1:1/m", {"headers": json.dumps({"Authorization": "Bearer HIDDEN\nX: y"})}),
        ("http://127.0.0.1:1/m", {"headers": json.dumps({"Authorization": "Bearer HIDDEN …"})}),
        ("https://127.0.0.1:1/m", {"certificate": "HIDDEN"}),
        ("https://127.0.0.1:1/m", {"client_certificate": "HIDDEN", "client_key": "HIDDEN"}),
        ("m", {"type": "http", "url": "ftp://user:HIDDEN@127.0.0.1:1"}),
        (
            "s3://b/m",
            {"access_key_id": "a", "secret_access_key": "HIDDEN", "endpoint_url": "http://u:HIDDEN@127.0.0.1:1"},
        ),
        ("s3://b/m", {"access_key_id": "a", "secret_access_key": "HIDDEN", "endpoint_url": "HIDDEN"}),
        ("az://a/c/m", {"client_id": "a", "client_secret": "HIDDEN"}),
        ("az://a/c/m", {"connection_string": "HIDDEN"}),
        ("gs://b/m", {"private_key": "HIDDEN", "client_email": "a@b"}),
    ],
)
def test_errors_of_unusable_locations_hold_no_secrets(
    uri: str, params: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.puller.sources.http_client._SMALL_TRIES", 1)
    with pytest.raises((InvalidRequest, LoadFailed)) as caught:
        source_of(uri, OPEN, **params).listing(job())
    error: BaseException | None = caught.value
    while error is not None:  # a log shows what it was raised from too
        assert "HIDDEN" not in str(error)
        error = error.__cause__


def test_headers_are_sent_without_a_trailing_newline(web: WebServer) -> None:
    tiny_llama(web.root / "m")
    web.secret = "Bearer K"
    source = source_of(f"{web.url}/m", OPEN, headers=json.dumps({"Authorization": "Bearer K\n"}))
    assert "config.json" in {file.name for file in source.listing(job()).files}


def test_url_credentials_become_a_header(web: WebServer) -> None:
    tiny_llama(web.root / "m")
    web.secret = f"Basic {base64.b64encode(b'me:p@ss').decode()}"
    listing = source_of(f"{web.url.replace('//', '//me:p%40ss@')}/m", OPEN).listing(job())
    assert all("@" not in file.location for file in listing.files)


def test_storage_url_query_stays_behind_the_path(web: WebServer) -> None:
    tiny_llama(web.root / "base" / "m")
    listing = source_of("m", OPEN, type="http", url=f"{web.url}/base?sig=s").listing(job())
    assert all(
        file.location.startswith(f"{web.url}/base/m/") and file.location.endswith("?sig=s") for file in listing.files
    )


def test_http_client_drops_headers_on_redirects(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = WebServer(tmp_path / "other")
    try:
        (other.root / "f").write_bytes(b"data")
        web.routes["/f"] = lambda: (302, {"Location": f"{other.url}/f"}, b"")
        HttpClient({"X-Api-Key": "T"}, destinations=ANYWHERE).fetch(
            RemoteFile("f", f"{web.url}/f", 4), tmp_path / "f", job(), lambda count: None
        )
        assert (tmp_path / "f").read_bytes() == b"data"
        assert web.headers[-1]["X-Api-Key"] == "T"
        assert other.headers
        assert all("X-Api-Key" not in headers for headers in other.headers)
    finally:
        other.close()


def test_http_client_refuses_file_urls(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    with pytest.raises(LoadFailed, match="is not HTTP"):
        HttpClient(destinations=ANYWHERE).read(f"file://{tmp_path}/f", 0, 4, PullJob(lambda progress: None))


def test_storage_credentials_stay_with_their_endpoint(tmp_path: Path, web: WebServer) -> None:
    config = RuntimeConfig(source_hosts=("*",), storage_config_dir=str(tmp_path))
    (tmp_path / "default").write_text(
        json.dumps({"type": "http", "url": "https://models.example", "headers": {"Authorization": "Bearer K"}})
    )
    (tmp_path / "minio").write_text(
        json.dumps(
            {
                "type": "s3",
                "access_key_id": "a",
                "secret_access_key": "HIDDEN",
                "endpoint_url": "http://minio:9000",
                "bucket": "b",
            }
        )
    )
    tiny_llama(web.root / "m")
    source_of(f"{web.url}/m", config).listing(job())  # another site: nothing of the default is used
    assert set(web.authorizations) == {""}
    with pytest.raises(InvalidRequest, match="storage key 'default' is for another site"):
        source_of(f"{web.url}/m", config, "default")
    (tmp_path / "untyped").write_text(
        json.dumps({"url": "https://models.example", "headers": {"Authorization": "Bearer K"}})
    )
    with pytest.raises(InvalidRequest, match="storage key 'untyped' is for another site"):
        source_of(f"{web.url}/m", config, "untyped", type="s3")
    (tmp_path / "anywhere").write_text(json.dumps({"type": "http", "headers": {"Authorization": "Bearer K"}}))
    with pytest.raises(InvalidRequest, match="storage key 'anywhere' is without the url that its headers are for"):
        source_of(f"{web.url}/m", config, "anywhere")
    with pytest.raises(InvalidRequest, match="cannot change url of the default storage configuration"):
        source_of("m", config, type="http", url=web.url)
    with pytest.raises(InvalidRequest, match="cannot change endpoint_url of storage key 'minio'"):
        source_of("m", config, "minio", endpoint_url=web.url)
    with pytest.raises(InvalidRequest, match="storage key 'minio' is of type s3"):
        source_of("gs://b/m", config, "minio")
    source_of("m", config, "minio", bucket="other", endpoint_url="http://minio:9000")
