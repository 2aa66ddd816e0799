"""Addresses: parsing, and whether one is free."""

import socket
from pathlib import Path

import pytest

from common.addresses import Address, check_free, parse_address
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address(host="127.0.0.1")),
        (":80", Address(host="0.0.0.0", port=80)),
        ("[::1]:8080", Address(host="::1", port=8080)),
        ("unix:/a/b", Address(path="/a/b")),
        ("unix:///a/b", Address(path="/a/b")),
    ],
)
def test_parse_address_forms(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["nonsense", "host:port", "host:99999", "unix:", "unix:/", "host:²"])
def test_parse_address_refuses_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="http_listen") as caught:
        parse_address(text, "http_listen")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_check_free_port_in_use(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(host=host, port=server.getsockname()[1])
        with pytest.raises(OSError, match=f"HTTP address {host}:.* cannot be listened on: Address already in use"):
            check_free(address, "HTTP")
    check_free(address, "HTTP")


def test_check_free_removes_only_a_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    address = Address(path=str(path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(OSError, match="another process listens there"):
            check_free(address)
    check_free(address)
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(OSError, match="not a socket"):
        check_free(address)
    assert path.read_text() == "a file"
