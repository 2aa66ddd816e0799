"""Where the store is, in all the ways that people and ModelMesh write it."""

import json
from pathlib import Path

import pytest

from mesh.errors import InvalidRequest
from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.factory import store_at
from mesh.store.location import EmbeddedLocation, EtcdLocation, parse_store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("etcd://h:2379", EtcdLocation(("h:2379",))),
        ("etcd://a:1,b:2/team/x/", EtcdLocation(("a:1", "b:2"), root_prefix="/team/x")),
        ("etcd://u:p%40ss@a:1", EtcdLocation(("a:1",), user="u", password="p@ss")),
        ("etcds://a:1?authority=etcd", EtcdLocation(("a:1",), tls=True, override_authority="etcd")),
        ("etcd:a:1,b:2", EtcdLocation(("a:1", "b:2"))),
        ("etcd:http://a:1,http://b:2", EtcdLocation(("a:1", "b:2"))),
        ("etcd://host", EtcdLocation(("host:2379",))),
        ("etcd://[::1]:2379", EtcdLocation(("[::1]:2379",))),
        ("embedded:/var/lib/x", EmbeddedLocation(Path("/var/lib/x"))),
        ("/var/lib/x", EmbeddedLocation(Path("/var/lib/x"))),
    ],
)
def test_parse_store_reads_every_form(text: str, expected: object) -> None:
    assert parse_store(text) == expected


def test_parse_store_reads_modelmeshs_json_file(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text(name)
    (tmp_path / "etcd.json").write_text(
        json.dumps(
            {
                "endpoints": "https://a:1,https://b:2",
                "userid": "u",
                "password": "p",
                "root_prefix": "/mm-serving",
                "certificate_file": "ca.pem",
                "client_certificate_file": "cert.pem",
                "client_key_file": str(tmp_path / "key.pem"),
                "override_authority": "etcd.local",
                "other": 1,
            }
        )
    )
    assert parse_store(f"etcd:{tmp_path}/etcd.json") == EtcdLocation(
        ("a:1", "b:2"),
        root_prefix="/mm-serving",
        user="u",
        password="p",
        tls=True,
        ca_pem=b"ca.pem",
        client_cert_pem=b"cert.pem",
        client_key_pem=b"key.pem",
        override_authority="etcd.local",
    )
    (tmp_path / "inline.json").write_text(
        json.dumps({"endpoints": "a:1", "certificate": "PEM", "client_certificate": "C", "client_key": "K"})
    )
    location = parse_store(f"etcd:{tmp_path}/inline.json")
    assert isinstance(location, EtcdLocation)
    assert (location.tls, location.ca_pem, location.client_cert_pem, location.client_key_pem) == (
        True,
        b"PEM",
        b"C",
        b"K",
    )


def test_parse_store_reads_files_named_in_a_url(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("CA")
    location = parse_store(f"etcd://a:1/p?ca={tmp_path}/ca.pem")
    assert location == EtcdLocation(("a:1",), root_prefix="/p", tls=True, ca_pem=b"CA")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nor a directory"),
        ("mysql://x", "'mysql'"),
        ("zookeeper:h:1", "zookeeper"),
        ("etcd://", "names no endpoint"),
        ("etcd://h:port", "'h:port' is not HOST:PORT"),
        ("etcd://u:secret@h:1?tls=1", "'tls'"),
        ("etcd:/none.json", "/none.json"),
        ("etcd://h:1?ca=/none.pem", "/none.pem"),
    ],
)
def test_parse_store_names_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        parse_store(text)
    assert "secret" not in error.value.message


def test_parse_store_names_a_broken_json_file(tmp_path: Path) -> None:
    for content in ("{", '{"userid": "u"}'):
        (tmp_path / "etcd.json").write_text(content)
        with pytest.raises(InvalidRequest, match=r"etcd\.json"):
            parse_store(f"etcd:{tmp_path}/etcd.json")


def test_location_repr_has_no_password() -> None:
    assert "hunter2" not in repr(parse_store("etcd://u:hunter2@h:1"))


def test_store_at_creates_the_store_of_a_location(tmp_path: Path) -> None:
    assert isinstance(store_at(EmbeddedLocation(tmp_path)), EmbeddedStore)
    assert isinstance(store_at(EtcdLocation(("h:1",))), EtcdStore)
