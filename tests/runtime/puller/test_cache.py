"""The disk cache: whole or not there, one fill for many, bounded, and clear about a full disk. With real processes where it matters."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from runtime.errors import Cancelled, ModelTooLarge, Overloaded
from runtime.puller.cache import Cache
from runtime.puller.progress import PullJob
from tests.support.sources import job


def put(cache: Cache, key: str, size: int) -> None:
    def fill(work: Path) -> None:
        (work / "f").write_bytes(bytes(size))

    cache.obtain("pulled", key, size, fill, job(), key).release()


def keys(cache: Cache, root: Path) -> set[str]:
    return {path.name for path in (root / "pulled").iterdir()}


def test_cache_fills_an_entry_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)
    made: list[int] = []

    asked = threading.Semaphore(0)

    def fill(work: Path) -> None:
        made.append(1)
        for _ in range(8):
            assert asked.acquire(timeout=10)
        (work / "f").write_text("x")

    def obtain() -> None:
        asked.release()
        cache.obtain("pulled", "k", 1, fill, job(), "k").release()

    threads = [threading.Thread(target=obtain) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    held = Cache(tmp_path, 1 << 20).find("pulled", "k")
    assert held is not None
    assert (held.path / "f").read_text() == "x"
    held.release()


def test_cache_resumes_a_failed_fill(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)

    def half(work: Path) -> None:
        (work / "part").write_text("half")
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        cache.obtain("pulled", "k", 1, half, job(), "k")
    assert cache.find("pulled", "k") is None
    found: list[bool] = []

    def rest(work: Path) -> None:
        found.append((work / "part").exists())

    cache.obtain("pulled", "k", 1, rest, job(), "k").release()
    assert found == [True]


def _fill_for_ever(root: str, started: "multiprocessing.synchronize.Event") -> None:
    def fill(work: Path) -> None:
        (work / "part").write_text("half")
        started.set()
        time.sleep(60)

    Cache(Path(root), 1 << 20).obtain("pulled", "k", 1, fill, job(), "k")


def test_cache_releases_the_bytes_of_a_killed_fill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_fill_for_ever, args=(str(tmp_path), started))
    process.start()
    assert started.wait(30)
    cache = Cache(tmp_path, 1 << 20)
    assert cache.find("pulled", "k") is None
    waiter = job()
    threading.Timer(0.3, waiter.cancel).start()
    with pytest.raises(Cancelled):  # the other process has it
        cache.obtain("pulled", "k", 1, lambda work: None, waiter, "k")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    seen: list[str] = []
    cache.obtain("pulled", "k", 1, lambda work: seen.extend(file.name for file in work.iterdir()), job(), "k").release()
    assert seen == ["part"]


def test_cache_drops_the_least_recently_used_idle_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for number, key in enumerate("abc"):
        put(cache, key, 300)
        os.utime(tmp_path / "pulled" / key / ".repertory.json", (number, number))
    held = cache.find("pulled", "a")  # used now
    assert held is not None
    put(cache, "d", 300)
    assert keys(cache, tmp_path) == {"a", "c", "d"}
    os.utime(tmp_path / "pulled" / "a" / ".repertory.json", (0, 0))
    put(cache, "e", 300)  # a is oldest, and held
    assert "a" in keys(cache, tmp_path)
    with pytest.raises(ModelTooLarge, match="budget of 1000 bytes"):
        put(cache, "huge", 1001)
    with pytest.raises(Overloaded, match="models in use hold 300 bytes"):
        put(cache, "f", 900)
    held.release()
    put(cache, "f", 900)
    assert keys(cache, tmp_path) == {"f"}
    assert cache.used_bytes() == 900


def test_cache_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 1 << 40)

    def full(work: Path) -> None:
        (work / "part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Overloaded, match="is full"):
        cache.obtain("pulled", "k", 1, full, job(), "org/model")
    assert not list((tmp_path / "work").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(Overloaded, match=r"org/model needs 11 bytes.*10 bytes are free"):
        cache.obtain("pulled", "k", 11, lambda work: None, job(), "org/model")


def test_cache_sweeps_leftovers(tmp_path: Path) -> None:
    Cache(tmp_path, 1000)
    (tmp_path / "work" / "trash-1").mkdir()
    (tmp_path / "work" / "pulled-old").mkdir()
    os.utime(tmp_path / "work" / "pulled-old", (0, 0))
    (tmp_path / "work" / "pulled-new").mkdir()
    Cache(tmp_path, 1000)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"pulled-new"}


def test_cache_counts_fills_in_progress(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    filling, go_on = threading.Event(), threading.Event()

    def slow(work: Path) -> None:
        filling.set()
        assert go_on.wait(60)
        (work / "f").write_bytes(bytes(600))

    thread = threading.Thread(target=lambda: cache.obtain("pulled", "slow", 600, slow, job(), "slow").release())
    thread.start()
    assert filling.wait(60)
    with pytest.raises(Overloaded, match="hold 600 bytes"):
        put(cache, "second", 600)
    put(cache, "small", 300)
    go_on.set()
    thread.join()
    assert keys(cache, tmp_path) == {"slow", "small"}
    put(cache, "second", 600)  # they are not in use now
    assert "slow" not in keys(cache, tmp_path)


def test_cache_refills_an_entry_that_lost_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)
    put(cache, "k", 300)
    os.truncate(tmp_path / "pulled" / "k" / "f", 100)
    assert cache.find("pulled", "k") is None
    put(cache, "k", 300)
    held = cache.find("pulled", "k")
    assert held is not None
    (held.path / "f").unlink()
    other = cache.find("pulled", "k")  # somebody uses it: it stays as it is
    assert other is not None
    held.release()
    third = cache.find("pulled", "k")  # and the caller that was given it holds it
    assert third is not None
    other.release()
    third.release()
    put(cache, "k", 300)
    assert (tmp_path / "pulled" / "k" / "f").stat().st_size == 300


def test_cache_entries_name_their_source_and_whether_they_are_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)

    def fill(work: Path) -> None:
        (work / "f").write_bytes(bytes(100))

    source = PullJob(lambda progress: None, "https://example.com/m.gguf?signature=secret")
    held = cache.obtain("packed", "used", 100, fill, source, "used")
    put(cache, "idle", 50)
    used, idle = cache.entries()
    assert (used.key, used.kind, used.uri, used.in_use) == ("packed-used", "packed", "https://example.com/m.gguf", True)
    assert (idle.key, idle.kind, idle.uri, idle.in_use) == ("pulled-idle", "pulled", "", False)
    assert idle.size_bytes == 50
    assert cache.drop({"packed-used", "pulled-idle", "pulled-unknown"}) == (50, 1)
    assert [entry.key for entry in cache.entries()] == ["packed-used"]
    held.release()
    assert cache.drop({"packed-used"}) == (100, 0)
    assert cache.entries() == []


def test_cache_entries_list_what_a_failed_fill_left(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)

    def half(work: Path) -> None:
        (work / "f").write_bytes(bytes(10))
        raise Cancelled("the load was cancelled")

    with pytest.raises(Cancelled):
        cache.obtain("pulled", "k", 100, half, job(), "k")
    (left,) = cache.entries()
    assert (left.key, left.kind, left.size_bytes, left.in_use) == ("pulled-k", "partial", 10, False)
    assert cache.drop({"pulled-k"}) == (10, 0)
