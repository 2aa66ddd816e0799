"""Fetching one file from a web server that cuts, changes, redirects and lies."""

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import Cancelled, LoadFailed
from runtime.puller.source import RemoteFile
from runtime.puller.sources.http_client import HttpClient
from tests.support.sources import ANYWHERE, job
from tests.support.web import WebServer


def test_fetch_resumes_only_the_same_file(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(range(256)) * 100)
    client = HttpClient(destinations=ANYWHERE)
    file = client.look("f", f"{web.url}/f", job())
    assert file is not None
    target = tmp_path / "f"
    target.with_name("f.part").write_bytes((web.root / "f").read_bytes()[:1000])
    target.with_name("f.tag").write_text("of another file")
    arrived: list[int] = []
    client.fetch(file, target, job(), arrived.append)
    assert target.read_bytes() == (web.root / "f").read_bytes()
    assert sum(arrived) == 25600
    assert not target.with_name("f.tag").exists()


def test_fetch_never_resumes_unidentified_content(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"new" * 1000)
    file = RemoteFile("f", f"{web.url}/f", 3000)  # as of a server without ETag and date
    (tmp_path / "f.part").write_bytes(b"old" * 500)
    (tmp_path / "f.tag").write_text("3000 ")
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), lambda count: None)
    assert (tmp_path / "f").read_bytes() == b"new" * 1000


def test_fetch_starts_over_without_ranges(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"x" * 10_000)
    web.ranges, web.cuts, web.cut_after = False, 1, 4000
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    arrived: list[int] = []
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), arrived.append)
    assert (tmp_path / "f").stat().st_size == sum(arrived) == 10_000


def test_fetch_deletes_a_file_with_a_wrong_checksum(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(b"data")
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    with pytest.raises(LoadFailed, match="f is corrupt: its sha256"):
        HttpClient(destinations=ANYWHERE).fetch(
            replace(file, sha256="0" * 64), tmp_path / "f", job(), lambda count: None
        )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("f") and path.suffix != ".tag"]


def test_fetch_survives_many_interruptions(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.puller.progress.PullJob.wait", lambda job, seconds: job.check())
    (web.root / "f").write_bytes(bytes(200_000))
    web.cuts, web.cut_after = 15, 10_000
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", job(), lambda count: None)
    assert (tmp_path / "f").stat().st_size == 200_000
    assert web.cuts == 0


def test_fetch_stops_at_the_listed_size(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(20 << 20))
    arrived: list[int] = []
    with pytest.raises(LoadFailed, match="the source lists 4"):
        HttpClient(destinations=ANYWHERE).fetch(
            RemoteFile("f", f"{web.url}/f", 4, '"tag"'), tmp_path / "f", job(), arrived.append
        )
    assert sum(arrived) < 4 << 20
    assert not (tmp_path / "f.part").exists()


def test_fetch_ignores_an_invalid_content_length(web: WebServer, tmp_path: Path) -> None:
    web.routes["/f"] = lambda: (200, {"Content-Length": "much"}, b"data")
    HttpClient(destinations=ANYWHERE).fetch(
        RemoteFile("f", f"{web.url}/f", 4), tmp_path / "f", job(), lambda count: None
    )
    assert (tmp_path / "f").read_bytes() == b"data"


def test_fetch_drops_the_token_on_a_redirect(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = WebServer(tmp_path / "other")
    try:
        (other.root / "f").write_bytes(b"data")
        web.routes["/f"] = lambda: (302, {"Location": f"{other.url}/f"}, b"")
        web.secret = "Bearer T"
        HttpClient({"Authorization": "Bearer T"}, destinations=ANYWHERE).fetch(
            RemoteFile("f", f"{web.url}/f", 4), tmp_path / "f", job(), lambda count: None
        )
        assert (tmp_path / "f").read_bytes() == b"data"
        assert web.authorizations == ["Bearer T"]
        assert other.authorizations == [""]
    finally:
        other.close()


def test_fetch_can_be_cancelled(web: WebServer, tmp_path: Path) -> None:
    (web.root / "f").write_bytes(bytes(10 << 20))
    file = HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", job())
    assert file is not None
    work = job()
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).fetch(file, tmp_path / "f", work, lambda count: work.cancel())
    assert not (tmp_path / "f").exists()


def test_http_client_stops_trying_again_once_it_is_cancelled(web: WebServer) -> None:
    work = job()

    def busy() -> tuple[int, dict[str, str], bytes]:
        work.cancel()
        return 503, {}, b""

    web.routes["/f"] = busy
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).look("f", f"{web.url}/f", work)
    with pytest.raises(Cancelled):
        HttpClient(destinations=ANYWHERE).read(f"{web.url}/f", 0, 4, work)
    assert len(web.log) == 1
