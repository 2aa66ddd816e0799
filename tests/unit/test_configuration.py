"""docs/configuration.md is what scripts/configuration.py generates."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_configuration_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPERTORY_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "scripts" / "configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text() == module.page()
