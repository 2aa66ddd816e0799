"""Sources that are silent, slow or larger than they say: they end within limits, can be cancelled, and keep nothing else waiting."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model_key import ModelSettings
from runtime.errors import LoadFailed, ModelTooLarge
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.rate_floor import RateFloor
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import OPEN
from tests.support.web import WebServer

MIB = 1 << 20


class SlowServer:
    """Accepts connections, and sends nothing or a byte of a header now and then, for ever."""

    def __init__(self, *, drips: bool) -> None:
        self._drips = drips
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self.accepted = threading.Semaphore(0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: " if self._drips else b"")
            self.accepted.release()
            while not self._ended.wait(0.02):
                if self._drips:
                    connection.sendall(b"x")


@pytest.fixture(params=[False, True], ids=["silent", "dripping"])
def slow(request: pytest.FixtureRequest) -> Iterator[SlowServer]:
    server = SlowServer(drips=request.param)
    yield server
    server.close()


async def test_prepare_of_a_hanging_source_can_be_cancelled(slow: SlowServer, tmp_path: Path) -> None:
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", MIB))
    work = asyncio.create_task(
        preparation.prepare(ModelSource(f"{slow.url}/m"), ModelSettings(), "cpu", lambda progress: None)
    )
    assert await asyncio.to_thread(slow.accepted.acquire, timeout=10)
    begun_s = time.monotonic()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert time.monotonic() - begun_s < 2
    preparation.close()


async def test_hanging_pulls_keep_no_local_model_waiting(slow: SlowServer, tmp_path: Path) -> None:
    config = msgspec.structs.replace(OPEN, max_loading_concurrency=1, max_pulling_concurrency=2)
    preparation = CheckpointPreparer(config, Cache(tmp_path / "cache", MIB))
    pulls = [
        asyncio.create_task(
            preparation.prepare(ModelSource(f"{slow.url}/{name}"), ModelSettings(), "cpu", lambda progress: None)
        )
        for name in "abcdefgh"
    ]
    for _ in range(2):
        assert await asyncio.to_thread(slow.accepted.acquire, timeout=10)
    tiny_llama(tmp_path / "m")
    async with asyncio.timeout(20):
        prepared = await preparation.prepare(
            ModelSource(str(tmp_path / "m")), ModelSettings(), "cpu", lambda progress: None
        )
    prepared.release()
    for pull in pulls:
        pull.cancel()
    await asyncio.gather(*pulls, return_exceptions=True)
    preparation.close()


async def test_body_of_unknown_size_keeps_to_the_disk_budget(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "m")
    (web.root / "m" / "model.safetensors").unlink()
    web.routes["/m/model.safetensors"] = lambda: (200, {"Content-Length": "unknown"}, bytes(40 * MIB))
    root = tmp_path / "cache"
    preparation = CheckpointPreparer(OPEN, Cache(root, 4 * MIB))
    most_bytes = 0

    def watch(_: object) -> None:
        nonlocal most_bytes
        files = [path for path in (root / "work").rglob("*") if path.is_file()]
        most_bytes = max(most_bytes, sum(path.stat().st_size for path in files))

    with pytest.raises(ModelTooLarge, match="more than the disk cache's budget") as refused:
        await preparation.prepare(ModelSource(f"{web.url}/m"), ModelSettings(), "cpu", watch)
    assert refused.value.limit == 4 * MIB
    assert most_bytes < 6 * MIB
    assert not list((root / "work").iterdir()), "what can never fit is not kept for the next try"
    preparation.close()


async def test_body_of_unknown_size_makes_room_by_dropping_idle_entries(web: WebServer, tmp_path: Path) -> None:
    tiny_llama(web.root / "m")
    data = (web.root / "m" / "model.safetensors").read_bytes()
    (web.root / "m" / "model.safetensors").unlink()
    web.routes["/m/model.safetensors"] = lambda: (200, {"Content-Length": "unknown"}, data)
    cache = Cache(tmp_path / "cache", 3 * len(data))
    preparation = CheckpointPreparer(OPEN, cache)
    tiny_llama(web.root / "old", seed=1)
    for name in ("old", "m"):
        prepared = await preparation.prepare(
            ModelSource(f"{web.url}/{name}"), ModelSettings(), "cpu", lambda progress: None
        )
        prepared.release()
    assert cache.used_bytes() <= cache.budget_bytes
    preparation.close()


@given(st.integers(1, 1 << 30), st.lists(st.tuples(st.floats(0.1, 30.0), st.integers(0, 1 << 31)), max_size=50))
def test_rate_floor_ends_exactly_the_pulls_with_a_slow_minute(limit: int, arrivals: list[tuple[float, int]]) -> None:
    now_s = since_s = 0.0
    floor = RateFloor(limit, "source", lambda: now_s)
    num_bytes = 0
    for pause_s, count in arrivals:
        now_s += pause_s
        num_bytes += count
        passed_s = now_s - since_s
        if passed_s >= 60 and num_bytes / passed_s < limit:
            with pytest.raises(LoadFailed, match="pull_min_rate_bytes"):
                floor.arrived(count)
            return
        floor.arrived(count)
        if passed_s >= 60:
            since_s, num_bytes = now_s, 0


def test_rate_floor_of_zero_is_none() -> None:
    now_s = 0.0
    floor = RateFloor(0, "source", lambda: now_s)
    now_s = 3600.0
    floor.arrived(1)
