"""What several of these tests stand on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.web import WebServer


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "www").mkdir()
    server = WebServer(tmp_path / "www")
    yield server
    server.close()
