"""The file of keys, the patterns of models, and the table that follows the file."""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from mesh.access.api_keys import digest_of, new_secret, read_key_file
from mesh.access.caller import Caller
from mesh.access.key_table import KeyTable
from mesh.access.scopes import Scope
from mesh.cli.main import main
from mesh.errors import PermissionDenied
from tests.support.waiting import until

DIGEST = digest_of("secret")


def write(path: Path, *keys: Mapping[str, object]) -> str:
    """Replace the file in one step, as a mounted secret is replaced."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"keys": keys}))
    fresh.replace(path)
    return str(path)


def test_read_key_file_fills_in_the_defaults(tmp_path: Path) -> None:
    (key,) = read_key_file(write(tmp_path / "keys", {"name": "a", "sha256": DIGEST}))
    assert key.name == "a"
    assert key.digests == {DIGEST}
    assert key.scopes == {Scope.INFERENCE}
    assert key.caller.may_use("anything")
    assert (key.requests_per_minute, key.max_concurrent) == (0, 0)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ([{"name": "a", "sha256": "secret"}], "64 hexadecimal digits"),
        ([{"name": "a", "sha256": []}], "64 hexadecimal digits"),
        ([{"name": "a", "sha256": DIGEST.upper()}], "64 hexadecimal digits"),
        ([{"name": "a b", "sha256": DIGEST}], "name"),
        ([{"name": "a\n", "sha256": DIGEST}], "name"),
        ([{"name": "a", "sha256": DIGEST, "scopes": ["root"]}], "root"),
        ([{"name": "a", "sha256": DIGEST, "scopes": []}], "allows nothing"),
        ([{"name": "a", "sha256": DIGEST, "models": []}], "allows nothing"),
        ([{"name": "a", "sha256": DIGEST, "max_concurrent": -1}], "max_concurrent"),
        ([{"name": "a", "sha256": DIGEST, "rate": 1}], "rate"),
        ([{"name": "a", "sha256": DIGEST}, {"name": "b", "sha256": DIGEST}], "two keys have the sha256"),
        ([{"name": "a", "sha256": DIGEST}, {"name": "a", "sha256": digest_of("b")}], "two keys have the name a"),
    ],
)
def test_read_key_file_names_what_is_wrong(tmp_path: Path, keys: list[dict[str, object]], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        read_key_file(write(tmp_path / "keys", *keys))
    assert str(tmp_path / "keys") in str(refused.value)


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (("smol",), ["smol"], ["smol-2", "Smol", "smol__0123456789", ""]),
        (("org/*", "other"), ["org/a", "org/a/b", "other"], ["org", "orga", "x/org/a"]),
        (("team-?",), ["team-a"], ["team-ab", "team-"]),
        (("*",), ["anything", ""], []),
    ],
)
def test_caller_may_use_what_its_patterns_match(
    patterns: tuple[str, ...], allowed: list[str], refused: list[str]
) -> None:
    caller = Caller("k", patterns)
    for name in allowed:
        caller.check_model(name)
    for name in refused:
        with pytest.raises(PermissionDenied, match="key k may not use it"):
            caller.check_model(name)


@given(st.text())
def test_key_table_finds_only_exact_secrets(sent: str) -> None:
    table = KeyTable(("plain",), "")
    assert (table.find(sent) is not None) == (sent == "plain")


def test_new_secrets_are_long_and_different() -> None:
    assert len({new_secret() for _ in range(100)}) == 100
    assert len(new_secret()) >= 43


async def test_key_table_follows_its_file_and_survives_a_broken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    table = KeyTable(("plain",), write(path, {"name": "a", "sha256": digest_of("first")}), poll_s=0.01)
    following = asyncio.create_task(table.run())
    try:
        assert table.find("first")
        both = {"name": "a", "sha256": [digest_of("first"), digest_of("second")]}
        write(path, both)
        await until(lambda: table.find("second"))
        assert table.find("first"), "old and new are valid together while callers change"
        write(path, {"name": "a", "sha256": "broken"})
        os.utime(path, ns=(1, 1))
        await until(lambda: "the keys stay as they were" in caplog.text)
        assert table.find("second"), "the keys stay as they were"
        write(path)
        await until(lambda: table.find("second") is None)
        assert table.find("plain")
    finally:
        following.cancel()


def test_key_table_with_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    table = KeyTable((), write(tmp_path / "keys"))
    assert table.is_required
    assert table.find("") is None


def test_new_key_makes_an_entry_for_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["new-key", "ui", "--scope", "inference", "--scope", "metrics", "--model", "org/*", "--max-concurrent", "4"]
    assert main(words) == 0
    said = capsys.readouterr()
    secret = said.err.split()[-1]
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + said.out)
    (key,) = read_key_file(str(path))
    assert secret not in said.out
    assert (key.name, key.models, key.max_concurrent) == ("ui", ("org/*",), 4)
    assert key.digests == {digest_of(secret)}
    assert key.scopes == {Scope.INFERENCE, Scope.METRICS}
