"""Where models may be fetched from: no private address by any spelling, redirect, second resolution, endpoint or proxy, unless listed."""

import ipaddress
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from runtime.config.schema import RuntimeConfig
from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.checkpoint_check import Policy, inspect
from runtime.puller.safetensors_header import read_header
from runtime.puller.sources.destinations import Destinations
from runtime.puller.sources.http_client import HttpClient
from runtime.puller.sources.resolve import locate
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import job, source_of
from tests.support.web import WebServer

PUBLIC = Destinations()


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",  # the same as one number
        "0xa9fea9fe",
        "127.0.0.1",
        "127.1",
        "0",
        "localhost",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
    ],
)
def test_connect_refuses_addresses_that_are_not_public(host: str) -> None:
    with pytest.raises(LoadFailed, match="is not a public address"):
        PUBLIC.connect(host, 80, 0.1)


@given(st.ip_addresses())
def test_require_listed_accepts_only_public_literals_and_what_is_listed(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    Destinations.parse([str(address)]).require_listed(str(address), "endpoint_url")
    if address.is_private or address.is_loopback or address.is_link_local:
        with pytest.raises(InvalidRequest, match="endpoint_url"):
            PUBLIC.require_listed(str(address), "endpoint_url")


@pytest.mark.parametrize("entry", ["", "a/b", "http://x", "10.0.0.0/99", "a\nb"])
def test_parse_refuses_what_is_no_host(entry: str) -> None:
    with pytest.raises(ConfigError, match="source_hosts"):
        Destinations.parse([entry])


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.0/8", "*"])
def test_http_client_fetches_from_listed_hosts_only(web: WebServer, entry: str) -> None:
    (web.root / "f").write_bytes(b"data")
    with pytest.raises(LoadFailed, match="source_hosts"):
        HttpClient().look("f", f"{web.url}/f", job())
    assert web.log == []
    assert HttpClient(destinations=Destinations.parse([entry])).read(f"{web.url}/f", 0, 4, job()) == b"data"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_http_client_checks_each_redirect(web: WebServer, code: int) -> None:
    (web.root / "secret").write_bytes(b"internal")
    by_name = web.url.replace("127.0.0.1", "localhost")
    client = HttpClient(destinations=Destinations.parse(["localhost"]))
    web.routes["/f"] = lambda: (code, {"Location": f"{web.url}/secret"}, b"")
    with pytest.raises(LoadFailed, match=r"'127\.0\.0\.1' is not a public address"):
        client.read(f"{by_name}/f", 0, 4, job())
    assert [path for _, path, _ in web.log] == ["/f"]


def test_http_client_connects_to_the_address_that_it_checked(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is connected to must not get through."""
    (web.root / "f").write_bytes(b"data")
    port = int(web.url.rpartition(":")[2])
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(LoadFailed, match="is not a public address"):
        HttpClient().read(f"http://rebound.example:{port}/f", 0, 4, job())
    assert web.log == []
    asked.clear()
    client = HttpClient(destinations=Destinations.parse(["127.0.0.0/8"]))
    assert client.read(f"http://rebound.example:{port}/f", 0, 4, job()) == b"data"
    assert asked == ["rebound.example"], "one resolution, for the check and the connection"


def test_http_client_does_not_send_private_addresses_to_a_proxy(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.delenv("no_proxy", raising=False)
    web.routes["http://models.example/f"] = lambda: (200, {}, b"data")
    for host in ("169.254.169.254", "localhost", "[::1]"):
        with pytest.raises(LoadFailed, match="is not a public address"):
            HttpClient().read(f"http://{host}/f", 0, 4, job())
    assert web.log == []
    assert HttpClient().read("http://models.example/f", 0, 4, job()) == b"data"


@pytest.mark.parametrize(
    ("uri", "params", "named"),
    [
        ("s3://b/m", {"endpoint_url": "http://169.254.169.254"}, "endpoint_url"),
        ("s3://b/m", {"endpoint_url": "https://minio.internal:9000"}, "endpoint_url"),
        ("gs://b/m", {"endpoint_url": "http://127.0.0.1:9"}, "endpoint_url"),
        ("gs://b/m", {"token_uri": "http://10.0.0.1/token"}, "token_uri"),
        ("az://a/c/m", {"endpoint_url": "http://[::1]:10000/a"}, "endpoint_url"),
        (
            "az://a/c/m",
            {"connection_string": "AccountName=a;AccountKey=eA==;BlobEndpoint=http://127.0.0.1:1/a"},
            "connection_string",
        ),
        ("az://a/c/m", {"connection_string": "UseDevelopmentStorage=true"}, "connection_string"),
        ("az://a/c/m", {"connection_string": "AccountName=a;EndpointSuffix=internal"}, "connection_string"),
        ("s3://b/m", {"ca_bundle": "/etc/passwd"}, "ca_bundle"),
        ("m", {"type": "s3", "bucket": "b", "endpoint_url": "http://127.0.0.1:9"}, "endpoint_url"),
    ],
)
def test_storage_params_lead_only_to_listed_hosts(uri: str, params: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        source_of(uri, RuntimeConfig(), **params)


def test_storage_configuration_of_the_operator_may_name_private_hosts(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "base" / "m")
    (tmp_path / "mine").write_text(json.dumps({"type": "http", "url": f"{web.url}/base"}))
    (tmp_path / "minio").write_text(json.dumps({"type": "s3", "bucket": "b", "endpoint_url": "http://10.0.0.1:9000"}))
    config = RuntimeConfig(storage_config_dir=str(tmp_path))
    assert source_of("m", config, "mine").listing(job()).files
    source_of("m", config, "minio")
    with pytest.raises(LoadFailed, match="is not a public address"):
        source_of("m", config, None, type="http", url=f"{web.url}/base").listing(job())


def test_local_path_is_refused_alike_whether_it_exists_or_not(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for roots in ((), (str(tmp_path / "roots"),)):
        texts = set()
        for path in ("elsewhere", "outside/../outside", "nothing", "roots/../nothing", "outside/sub"):
            with pytest.raises(InvalidRequest) as refused:
                locate(ModelSource(f"{tmp_path}/{path}"), RuntimeConfig(model_roots=roots))
            texts.add(str(refused.value).replace(path, "PATH"))
        assert len(texts) == 1, texts
        assert str(tmp_path / "roots") not in texts.pop().replace(f"{tmp_path}/PATH", "")


def test_local_path_needs_roots_also_for_file_urls(tmp_path: Path) -> None:
    for uri in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(InvalidRequest, match="--model-roots"):
            locate(ModelSource(uri), RuntimeConfig())


@pytest.mark.parametrize(
    "content", [b"SECRET-KEY-MATERIAL", b"SECRET\xff\xfe", b'{"a": SECRET', b"\x53\x45\x43\x52\x45\x54\0\0rest"]
)
def test_errors_of_files_that_are_no_checkpoint_show_nothing_of_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(content)
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    number = str(int.from_bytes(content[:8], "little"))
    for action in (
        lambda: inspect(tmp_path / "m.gguf", Policy()),
        lambda: inspect(tmp_path / "m", Policy()),
        lambda: read_header(tmp_path / "m" / "model.safetensors"),
    ):
        with pytest.raises(LoadFailed) as refused:
            action()
        error: BaseException | None = refused.value
        while error is not None:
            assert "SECRET" not in str(error)
            assert "0xff" not in str(error)
            assert number not in str(error)
            error = error.__cause__
