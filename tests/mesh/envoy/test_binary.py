"""Finding an Envoy program and checking its version."""

from pathlib import Path

import pytest

from mesh.envoy.binary import INSTALLED, find_envoy
from mesh.errors import InvalidRequest


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


def test_find_envoy_takes_the_installed_program() -> None:
    assert find_envoy(INSTALLED).version == "1.40.0"


def test_find_envoy_takes_a_later_version_at_a_path(tmp_path: Path) -> None:
    path = program(tmp_path / "envoy", "envoy  version: 0a1b/2.0.3/Clean/RELEASE/BoringSSL")
    assert find_envoy(path).version == "2.0.3"


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("envoy  version: 0a1b/1.39.3/Clean/RELEASE/BoringSSL", "has version 1.39.3; 1.40 or later is needed"),
        ("another program", "does not print an Envoy version"),
    ],
)
def test_find_envoy_refuses_other_programs(tmp_path: Path, output: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        find_envoy(program(tmp_path / "envoy", output))


def test_find_envoy_names_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nothing-here cannot be run: No such file or directory"):
        find_envoy(str(tmp_path / "nothing-here"))
