"""A file beside the host arena that lists its images, so that a restarted engine finds its models there."""

import logging
from pathlib import Path

import msgspec

_LOG = logging.getLogger(__name__)


class IndexEntry(msgspec.Struct, frozen=True):
    """A complete image: `size_bytes` in `chunks`, in order. Entries lie least recently used first."""

    key: str
    size_bytes: int
    chunks: tuple[int, ...]


class IndexPage(msgspec.Struct, frozen=True):
    """The content of the file. It is valid only for an arena of the same sizes."""

    chunk_bytes: int
    total_chunks: int
    entries: tuple[IndexEntry, ...]


class ArenaIndex:
    """The file `<arena>.index`; with an empty path nothing is kept."""

    def __init__(self, arena_path: str) -> None:
        self._path = Path(f"{arena_path}.index") if arena_path else None

    def read(self, chunk_bytes: int, total_chunks: int) -> tuple[IndexEntry, ...]:
        """Return the entries of an arena of the same sizes; none if the file is missing, damaged or of another arena."""
        if self._path is None:
            return ()
        try:
            page = msgspec.msgpack.decode(self._path.read_bytes(), type=IndexPage)
        except (OSError, msgspec.MsgspecError):
            return ()
        chunks = [chunk for entry in page.entries for chunk in entry.chunks]
        sound = len(set(chunks)) == len(chunks) and all(0 <= chunk < total_chunks for chunk in chunks)
        return page.entries if sound and (page.chunk_bytes, page.total_chunks) == (chunk_bytes, total_chunks) else ()

    def write(self, chunk_bytes: int, total_chunks: int, entries: tuple[IndexEntry, ...]) -> None:
        """Replace the file atomically. If that fails, delete it: an older file would name chunks with other content."""
        if self._path is None:
            return
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.msgpack.encode(IndexPage(chunk_bytes, total_chunks, entries)))
            fresh.replace(self._path)
        except OSError as error:
            _LOG.warning("the engine will find no model warm when it comes back: %s", error)
            for file in (fresh, self._path):
                file.unlink(missing_ok=True)
