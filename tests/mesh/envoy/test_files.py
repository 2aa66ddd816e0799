"""The shared files of mesh and Envoy."""

import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from mesh.envoy.files import EnvoyFiles, write_whole


def test_write_whole_replaces_the_file_and_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    assert write_whole(path, "one")
    first = path.stat().st_ino
    assert not write_whole(path, "one")
    assert path.stat().st_ino == first
    assert write_whole(path, "two")
    assert path.stat().st_ino != first, "Envoy sees a file that is moved to its place, and no other change"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_make_directory_keeps_others_out(tmp_path: Path) -> None:
    EnvoyFiles(tmp_path / "a" / "b").make_directory()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_make_directory_refuses_a_path_too_long_for_sockets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the limit is 107"):
        EnvoyFiles(tmp_path / ("x" * 100)).make_directory()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_make_directory_refuses_one_that_others_can_write_to(tmp_path: Path, mode: int) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 700"):
        EnvoyFiles(tmp_path / "shared").make_directory()


def test_make_directory_takes_one_that_others_can_only_read(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    EnvoyFiles(tmp_path / "shared").make_directory()
