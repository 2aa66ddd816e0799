"""A setting given as text or file: changes are followed, and a broken file changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.reloaded_setting import ReloadedSetting


def setting(text: str) -> ReloadedSetting[Any]:
    return ReloadedSetting("limits", text, json.loads, default={}, check_s=0.0)


def test_reloaded_setting_is_text_or_a_file_or_the_default(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}')
    assert setting("").value == {}
    assert setting('{"a": 2}').value == {"a": 2}
    assert setting(f"@{tmp_path}/file").value == {"a": 1}


def test_reloaded_setting_follows_a_replaced_link(tmp_path: Path) -> None:
    """Kubernetes updates a mounted ConfigMap by moving a link."""
    for name, content in (("old", '{"a": 1}'), ("new", '{"a": 2}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    link = tmp_path / "data"
    link.symlink_to("old")
    followed = setting(f"@{link}/file")
    assert followed.value == {"a": 1}
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").rename(link)
    assert followed.value == {"a": 2}


def test_reloaded_setting_keeps_its_value_while_the_file_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text('{"a": 1}')
    followed = setting(f"@{file}")
    file.write_text("{")
    assert [followed.value, followed.value] == [{"a": 1}] * 2
    assert caplog.text.count("stays in force") == 1
    file.unlink()
    assert followed.value == {"a": 1}
    file.write_text('{"a": 3}')
    assert followed.value == {"a": 3}


@pytest.mark.parametrize("text", ["{", "@/nowhere/at/all"])
def test_reloaded_setting_that_cannot_be_read_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="limits"):
        setting(text)
