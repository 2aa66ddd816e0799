"""Provides the SQLite file of the embedded store. Every method blocks, and all calls come from one thread."""

import itertools
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from mesh.errors import StoreError
from mesh.store.protocol import Entry, EntryDeleted, EntryPut

FORMAT_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO counter VALUES ('revision', 1);
"""
_COLUMNS = "key, value, create_revision, mod_revision, lease_id"


class EntryFile:
    """The entries that outlive the process. Raises sqlite3.Error, and StoreError where noted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def open(self) -> int:
        """Open or create the file, and return its revision. Raises OSError, and StoreError for a damaged file or one of another version."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # In autocommit mode, the sqlite3 module starts no transactions of its own.
        database = sqlite3.connect(self._path, isolation_level=None, timeout=0.0)
        try:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT_VERSION):
                raise StoreError(f"store: {self._path} has format {version}; this version reads {FORMAT_VERSION}")
            damage = database.execute("PRAGMA quick_check").fetchone()[0]
            if damage != "ok":
                raise StoreError(f"store: {self._path} is damaged: {damage}")
            if version != FORMAT_VERSION:
                database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={FORMAT_VERSION}; COMMIT;")
            revision: int = database.execute("SELECT value FROM counter WHERE name='revision'").fetchone()[0]
        except BaseException:
            database.close()
            raise
        self._database = database
        return revision

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, keys: Iterable[str]) -> dict[str, Entry]:
        """Return the entries that exist, by key. Raises StoreError if the file is not open."""
        query = f"SELECT {_COLUMNS} FROM entry WHERE key=? AND lease_id=0"
        rows = (self._opened().execute(query, (key,)).fetchone() for key in keys)
        return {row[0]: Entry(*row) for row in rows if row is not None}

    def under(self, prefix: str) -> list[Entry]:
        """Return the entries under a prefix, sorted by key. Raises StoreError if the file is not open."""
        query = f"SELECT {_COLUMNS} FROM entry WHERE key>=? AND lease_id=0 ORDER BY key"
        rows = self._opened().execute(query, (prefix,))
        return [Entry(*row) for row in itertools.takewhile(lambda row: row[0].startswith(prefix), rows)]

    def commit(self, events: Sequence[EntryPut | EntryDeleted], revision: int) -> None:
        """Write the events of one revision in one transaction, with an fsync. Leased entries are left out. Raises StoreError if the file is not open."""
        database = self._opened()
        try:
            database.execute("BEGIN IMMEDIATE")
            for event in events:
                if isinstance(event, EntryPut) and not event.entry.lease_id:
                    entry = event.entry
                    row = (entry.key, entry.value, entry.create_revision, entry.mod_revision, entry.lease_id)
                    database.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
                else:
                    key = event.entry.key if isinstance(event, EntryPut) else event.key
                    database.execute("DELETE FROM entry WHERE key=?", (key,))
            database.execute("UPDATE counter SET value=? WHERE name='revision'", (revision,))
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError("store: not open")
        return self._database
