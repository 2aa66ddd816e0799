"""What only the embedded store must bear: kill -9, a second process, a damaged file, a full disk, its own restart."""

import asyncio
import itertools
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import StoreError
from mesh.store.embedded import FILE_NAME, EmbeddedStore
from mesh.store.protocol import Compare, Delete, EntryPut, Put, Relisted
from tests.support.scripted_writes import steps


def write_until_killed(directory: Path, seed: int, acknowledged: int) -> int:
    """Kill a writer after so many acknowledgements; returns the last one's number."""
    command = [sys.executable, "-m", "tests.support.scripted_writes", str(directory), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = [writer.stdout.readline() for _ in range(acknowledged)]
        writer.send_signal(signal.SIGKILL)
        return int([*told, *writer.stdout][-1])


async def contents(directory: Path) -> dict[str, bytes]:
    store = EmbeddedStore(directory)
    await store.open()
    listing = await store.get_prefix("/")
    assert await store.put("/probe", b"") == listing.revision + 1
    await store.delete("/probe")
    await store.close()
    return {entry.key: entry.value for entry in listing.entries}


def after(state: dict[str, bytes], seed: int, count: int) -> dict[str, bytes]:
    state = dict(state)
    for step in itertools.islice(steps(seed), count):
        for key in step.keys:
            if step.value is None:
                state.pop(key, None)
            else:
                state[key] = step.value
    return state


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), patience=st.lists(st.integers(1, 80), min_size=2, max_size=3))
async def test_embedded_keeps_acknowledged_writes_over_a_kill(
    tmp_path_factory: pytest.TempPathFactory, seed: int, patience: list[int]
) -> None:
    """One directory, killed again and again at moments that hypothesis and the scheduler choose."""
    directory = tmp_path_factory.mktemp("killed")
    state: dict[str, bytes] = {}
    for number, acknowledged in enumerate(patience, start=seed):
        told = write_until_killed(directory, number, acknowledged)
        found = await contents(directory)
        # the write that the kill interrupted is there whole, or not at all
        assert found in (after(state, number, told), after(state, number, told + 1))
        state = found


async def test_embedded_restart_restores_all_but_leased_keys(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    await store.put("/a", b"1")
    entry = await store.get("/a")
    lease = await store.grant(30)
    await store.put("/pod", b"", lease=lease)
    await store.close()
    again = EmbeddedStore(tmp_path)
    await again.open()
    assert await again.get("/a") == entry
    assert await again.get("/pod") is None
    assert (await again.get_prefix("/")).revision > lease.id
    await again.close()


async def test_embedded_opens_a_file_without_writing(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    await store.put("/a", b"1")
    await store.put("/taken-over", b"2")
    await store.put("/pod", b"3", lease=await store.grant(30))
    await store.put("/taken-over", b"4", lease=await store.grant(30))
    await store.close()
    script = "import asyncio, sys; from tests.mesh.store.test_embedded import look; asyncio.run(look(sys.argv[1]))"
    looking = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), stdout=subprocess.PIPE)
    assert (await looking.communicate())[0].split() == [b"/a", b"/pod"]


async def look(directory: str) -> None:
    """With a file size limit of nothing, which stands for a full disk: what is there, then a leased key and one that cannot be kept."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    store = EmbeddedStore(Path(directory))
    await store.open()
    await store.put("/pod", b"", lease=await store.grant(30))
    with pytest.raises(StoreError):
        await store.put("/b", b"")
    sys.stdout.write("\n".join(entry.key for entry in (await store.get_prefix("/")).entries))
    await store.close()


async def test_embedded_refuses_a_second_process(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    second = EmbeddedStore(tmp_path)
    with pytest.raises(StoreError, match=r"registry\.sqlite3 is in use by another process"):
        await second.open()
    await second.close()
    await store.put("/a", b"1")
    await store.close()


async def test_embedded_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is no database" * 1000)
    store = EmbeddedStore(tmp_path)
    with pytest.raises(StoreError, match=FILE_NAME):
        await store.open()
    await store.close()


async def test_embedded_refuses_a_file_of_a_newer_version(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version=99")
    database.close()
    store = EmbeddedStore(tmp_path)
    with pytest.raises(StoreError, match="has format 99; this version reads 1"):
        await store.open()
    await store.close()


async def test_embedded_names_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = EmbeddedStore(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="file/store"):
        await store.open()
    await store.close()


async def test_embedded_write_that_the_disk_refuses_changes_nothing(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    await store.put("/a", b"1")
    events = store.watch("/")
    assert isinstance(await anext(events), Relisted)
    before = await store.get_prefix("/")
    # A limit of the file's size stands for a full disk. Python ignores the signal that would come with it.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(StoreError, match=FILE_NAME):
            await store.txn([], [Put("/a", b"2"), Put("/b", b"x" * 1_000_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.get_prefix("/") == before
    await store.put("/c", b"small")
    event = await anext(events)
    assert isinstance(event, EntryPut)
    assert (event.entry.key, event.entry.mod_revision) == ("/c", before.revision + 1)
    await events.aclose()
    await store.close()


async def test_embedded_cancelled_write_leaves_memory_and_file_equal(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    for number in range(30):
        write = asyncio.ensure_future(store.put(f"/{number}", b""))
        for _ in range(number % 5):
            await asyncio.sleep(0)
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
    # a write waits for those before it, the abandoned ones too
    await store.put("/last", b"")
    in_memory = await store.get_prefix("/")
    await store.close()
    again = EmbeddedStore(tmp_path)
    await again.open()
    assert await again.get_prefix("/") == in_memory
    await again.close()


async def test_embedded_leased_key_takes_the_place_of_a_kept_one_and_back(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    created = await store.put("/a", b"1")
    lease = await store.grant(30)
    await store.put("/a", b"2", lease=lease)
    entry = await store.get("/a")
    assert entry is not None
    assert (entry.value, entry.create_revision, entry.lease_id) == (b"2", created, lease.id)
    assert (await store.get_prefix("/")).entries == (entry,)
    await store.put("/a", b"3")
    await store.revoke(lease)
    entry = await store.get("/a")
    assert entry is not None
    assert (entry.value, entry.create_revision, entry.lease_id) == (b"3", created, 0)
    await store.close()


async def test_embedded_watch_from_before_the_history_begins_with_a_listing(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, history_events=4)
    await store.open()
    revisions = [await store.put("/a", str(number).encode()) for number in range(10)]
    for from_revision, listed in [
        (revisions[0], True),
        (revisions[5], True),
        (revisions[6], False),
        (revisions[9] + 5, True),
    ]:
        async with aclosing(store.watch("/", from_revision)) as events:
            first = await anext(events)
        assert isinstance(first, Relisted) == listed
        if isinstance(first, Relisted):
            assert first.went_back == (from_revision > revisions[9])
        else:
            assert isinstance(first, EntryPut)
            assert first.entry.mod_revision == from_revision
    await store.close()


keys = st.sampled_from(["/a", "/b", "/c"])
writes = st.lists(
    st.one_of(st.builds(Put, keys, st.binary(max_size=3)), st.builds(Delete, keys)),
    max_size=3,
    unique_by=lambda write: write.key,
)
compares = st.lists(
    st.builds(Compare, keys, st.one_of(st.none(), st.integers(0, 9)), st.one_of(st.none(), st.integers(0, 9))),
    max_size=2,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(compares, writes), max_size=12))
async def test_embedded_equals_a_dictionary_with_revisions(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[list[Compare], list[Put | Delete]]]
) -> None:
    """Against a model; then again after a restart."""
    directory = tmp_path_factory.mktemp("model")
    store = EmbeddedStore(directory)
    await store.open()
    model: dict[str, tuple[bytes, int, int]] = {}
    revision = (await store.get_prefix("/")).revision
    for wanted, changes in steps:
        holds = all(
            compare.mod_revision in (None, model.get(compare.key, (b"", 0, 0))[2])
            and compare.create_revision in (None, model.get(compare.key, (b"", 0, 0))[1])
            for compare in wanted
        )
        effective = [change for change in changes if isinstance(change, Put) or change.key in model] if holds else []
        revision += bool(effective)
        for change in effective:
            if isinstance(change, Put):
                model[change.key] = (change.value, model.get(change.key, (b"", revision, 0))[1], revision)
            else:
                del model[change.key]
        result = await store.txn(wanted, changes)
        assert (result.succeeded, result.revision) == (holds, revision)
    for _ in range(2):
        listing = await store.get_prefix("/")
        assert {
            entry.key: (entry.value, entry.create_revision, entry.mod_revision) for entry in listing.entries
        } == model
        assert listing.revision == revision
        await store.close()
        store = EmbeddedStore(directory)
        await store.open()
    await store.close()
