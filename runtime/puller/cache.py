"""Directories on disk that are filled once, found by a key, locked while in use, and dropped least recently used under a byte budget.

A directory appears under its key complete or not at all: it is filled elsewhere, flushed and renamed. File locks protect entries and fills, so
that several processes may share one cache.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ModelTooLarge, Overloaded, RepertoryError
from runtime.models.model_state import Phase
from runtime.puller.progress import PullJob

_MANIFEST = ".repertory.json"
_POLL_S = 0.1
_GROWTH_BYTES = 64 * 1024 * 1024
log = logging.getLogger(__name__)
_STALE_S = 7 * 24 * 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Held:
    """An entry that cannot be dropped until `release`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True, slots=True)
class _Item:
    """`pending_bytes` are still to be written by a fill in progress."""

    path: Path
    lock_name: str
    size_bytes: int
    used_s: float
    pending_bytes: int = 0
    uri: str = ""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An entry as `Cache.entries` lists it. `kind` is pulled, packed or partial; `key` is for `Cache.drop`."""

    key: str
    kind: str
    uri: str
    size_bytes: int
    used_s: float
    in_use: bool


class Cache:
    """`budget_bytes` 0 = 80 % of what the disk has free, counting what the cache holds already. All methods block; call them in threads."""

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        for name in ("pulled", "packed", "work", "locks", "notes"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._sweep()
        self.budget_bytes = budget_bytes or (shutil.disk_usage(root).free + self.used_bytes()) * 8 // 10

    def remember(self, name: str, content: bytes) -> None:
        """Keep a small note, replacing the one before."""
        temporary = self._root / "work" / f"trash-{uuid.uuid4().hex}"
        temporary.write_bytes(content)
        temporary.rename(self._root / "notes" / name)

    def recall(self, name: str) -> bytes | None:
        try:
            return (self._root / "notes" / name).read_bytes()
        except FileNotFoundError:
            return None

    def used_bytes(self) -> int:
        return sum(item.size_bytes for item in self._items())

    def entries(self) -> list[CacheEntry]:
        """List what the cache holds, the largest first."""
        found = [
            CacheEntry(
                item.lock_name,
                "partial" if item.path.parent.name == "work" else item.path.parent.name,
                item.uri,
                item.size_bytes,
                item.used_s,
                self._is_locked(item.lock_name),
            )
            for item in self._items()
        ]
        return sorted(found, key=lambda entry: -entry.size_bytes)

    def drop(self, keys: Collection[str]) -> tuple[int, int]:
        """Drop entries. Return the bytes that were freed, and how many entries stay because they are in use."""
        freed_bytes, num_in_use = 0, 0
        for item in self._items():
            if item.lock_name not in keys:
                continue
            if self._drop(item):
                freed_bytes += item.size_bytes
            else:
                num_in_use += 1
        return freed_bytes, num_in_use

    def find(self, area: str, key: str) -> Held | None:
        """Return a complete entry, locked, or None. An entry whose files were truncated or removed is dropped unless others use it."""
        path = self._root / area / key
        if not path.is_dir():
            return None
        lock = self._open(f"{area}-{key}")
        if not _try_lock(lock, fcntl.LOCK_SH) or not path.is_dir():
            os.close(lock)
            return None
        if not _is_whole(path):
            unused = _try_lock(lock, fcntl.LOCK_EX)  # fails with the shared one lost
            if unused:
                log.warning("%s has lost files since it was filled; it will be filled again", path)
                self._throw_away(path)
            if unused or not _try_lock(lock, fcntl.LOCK_SH) or not path.is_dir():
                os.close(lock)
                return None
        _touch(path)
        return Held(path, lock)

    def obtain(
        self, area: str, key: str, need_bytes: int, fill: Callable[[Path], None], job: PullJob, what: str
    ) -> Held:
        """Return the entry, locked. If there is none, one of the callers runs `fill` on an empty or partly filled directory.

        A `fill` that raises leaves its files for the next try, except on a full disk. Raises Overloaded if the cache cannot hold the bytes.
        """
        while True:
            held = self.find(area, key)
            if held is not None:
                return held
            lock = self._open(f"{area}-{key}")
            if _try_lock(lock, fcntl.LOCK_EX):
                try:
                    path = self._root / area / key
                    if not path.is_dir():
                        self._fill(path, area, key, need_bytes, fill, what, job.uri, lock)
                    fcntl.flock(
                        lock, fcntl.LOCK_SH
                    )  # Not atomic: another process may have dropped the entry in between.
                    if path.is_dir():
                        _touch(path)
                        return Held(path, lock)
                except BaseException:
                    os.close(lock)
                    raise
            os.close(lock)
            work = self._root / "work" / f"{area}-{key}"
            job.say(
                Phase.PULLING if area == "pulled" else Phase.PACKING,
                _size_of(work),
                need_bytes,
                f"{what}: waiting for another load of the same files",
            )
            job.wait(_POLL_S)

    def grow(self, area: str, key: str, total_bytes: int, what: str) -> int:
        """Reserve more room for a fill in progress, whose source did not state its size, and return the bytes that are reserved now.

        Raises ModelTooLarge, Overloaded.
        """
        name = f"{area}-{key}"
        wanted = max(total_bytes, min(total_bytes + _GROWTH_BYTES, self.budget_bytes))
        lock = self._open(name)
        try:
            self._reserve(name, wanted, what, lock)
        finally:
            os.close(lock)
        return wanted

    def _reserve(self, name: str, need_bytes: int, what: str, lock: int) -> None:
        """Make room for a fill of `need_bytes`, some of which may be there, and note it for processes that look while its lock is held."""
        room = self._open("room")  # Two concurrent fills must not both get the remaining bytes.
        try:
            fcntl.flock(room, fcntl.LOCK_EX)
            self.make_room(need_bytes, what, keep=name, present_bytes=_size_of(self._root / "work" / name))
            os.truncate(lock, 0)
            os.pwrite(lock, str(need_bytes).encode(), 0)
        finally:
            os.close(room)

    def make_room(self, need_bytes: int, what: str, *, keep: str = "", present_bytes: int = 0) -> None:
        """Drop idle entries, least recently used first, until `need_bytes` fit the budget, and those that are not present yet fit the disk.

        `keep` names the fill that needs them, which has `present_bytes` already.
        """
        if need_bytes > self.budget_bytes:
            raise ModelTooLarge(
                f"{what} needs {need_bytes} bytes, more than the disk cache's budget of {self.budget_bytes} bytes",
                limit=self.budget_bytes,
                value=need_bytes,
            )
        items = [item for item in self._items() if item.lock_name != keep]
        pending = sum(item.pending_bytes for item in items)
        used = sum(item.size_bytes for item in items) + pending
        for item in sorted(items, key=lambda one: one.used_s):
            if used + need_bytes <= self.budget_bytes and (
                shutil.disk_usage(self._root).free - pending >= need_bytes - present_bytes
            ):
                return
            if self._drop(item):
                used -= item.size_bytes
        free = shutil.disk_usage(self._root).free - pending
        if free < need_bytes - present_bytes:
            raise _disk_full(what, need_bytes - present_bytes, free, self._root)
        if used + need_bytes > self.budget_bytes:
            raise Overloaded(
                f"{what} needs {need_bytes} bytes; models in use hold {used} bytes of the disk cache's budget of {self.budget_bytes} bytes"
            )

    def _fill(
        self,
        path: Path,
        area: str,
        key: str,
        need_bytes: int,
        fill: Callable[[Path], None],
        what: str,
        uri: str,
        lock: int,
    ) -> None:
        work = self._root / "work" / f"{area}-{key}"
        self._reserve(f"{area}-{key}", need_bytes, what, lock)
        try:
            work.mkdir(exist_ok=True)
            fill(work)
            size_bytes = _size_of(work)
            (work / _MANIFEST).write_text(json.dumps({"what": what, "uri": uri, "size_bytes": size_bytes}))
            for file in work.rglob("*"):
                _flush(file)
            _flush(work)
            work.rename(path)
            _flush(path.parent)
        except (OSError, RepertoryError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _FULL:
                free = shutil.disk_usage(self._root).free
                shutil.rmtree(work, ignore_errors=True)
                raise _disk_full(what, need_bytes, free, self._root) from error
            if isinstance(error, ModelTooLarge):
                shutil.rmtree(work, ignore_errors=True)
            raise

    def _items(self) -> list[_Item]:
        items = []
        for area in ("pulled", "packed"):
            for path in (self._root / area).iterdir():
                with suppress(OSError, ValueError, KeyError):
                    manifest = path / _MANIFEST
                    recorded = json.loads(manifest.read_text())
                    items.append(
                        _Item(
                            path,
                            f"{area}-{path.name}",
                            int(recorded["size_bytes"]),
                            manifest.stat().st_mtime,
                            uri=str(recorded.get("uri", "")),
                        )
                    )
        for path in (self._root / "work").iterdir():
            with suppress(OSError):
                size_bytes = _size_of(path)
                items.append(
                    _Item(
                        path, path.name, size_bytes, path.stat().st_mtime, max(self._need_of(path.name) - size_bytes, 0)
                    )
                )
        return items

    def _need_of(self, lock_name: str) -> int:
        """Return the bytes that a fill in progress needs, or 0."""
        lock = self._open(lock_name)
        try:
            return 0 if _try_lock(lock, fcntl.LOCK_SH) else int(os.pread(lock, 32, 0) or b"0")
        finally:
            os.close(lock)

    def _is_locked(self, lock_name: str) -> bool:
        lock = self._open(lock_name)
        try:
            return not _try_lock(lock, fcntl.LOCK_EX)
        finally:
            os.close(lock)

    def _drop(self, item: _Item) -> bool:
        lock = self._open(item.lock_name)
        try:
            if not _try_lock(lock, fcntl.LOCK_EX):
                return False
            self._throw_away(item.path)
            return True
        finally:
            os.close(lock)

    def _throw_away(self, path: Path) -> None:
        trash = self._root / "work" / f"trash-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _sweep(self) -> None:
        for path in (self._root / "work").iterdir():
            with suppress(OSError):
                if path.name.startswith("trash-"):
                    shutil.rmtree(path, ignore_errors=True)
                elif time.time() - path.stat().st_mtime > _STALE_S:
                    self._drop(_Item(path, path.name, 0, 0.0))

    def _open(self, name: str) -> int:
        return os.open(self._root / "locks" / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _touch(path: Path) -> None:
    with suppress(OSError):
        os.utime(path / _MANIFEST)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_whole(path: Path) -> bool:
    """Return whether the size is as recorded. Readers verify the contents."""
    try:
        manifest = path / _MANIFEST
        return _size_of(path) - manifest.stat().st_size == int(json.loads(manifest.read_text())["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _size_of(path: Path) -> int:
    """Return the bytes below `path`. Files that disappear meanwhile are not counted."""
    total = 0
    with suppress(FileNotFoundError):
        for file in path.rglob("*"):
            with suppress(OSError):
                if file.is_file():
                    total += file.stat().st_size
    return total


def _disk_full(what: str, need_bytes: int, free_bytes: int, root: Path) -> Overloaded:
    return Overloaded(
        f"{what} needs {need_bytes} bytes; the disk of the cache ({root}) is full: {free_bytes} bytes are free"
    )
