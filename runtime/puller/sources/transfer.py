"""Brings a remote file to disk: resumes what an earlier try left, retries interruptions, and verifies the result. Common to all sources."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.progress import PullJob
from runtime.puller.source import Arrived, RemoteFile

_CHUNK_BYTES = 1024 * 1024
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0


class Interrupted(LoadFailed):
    """A try that failed and is worth another one."""


def transfer(
    file: RemoteFile, target: Path, job: PullJob, arrived: Arrived, receive: Callable[[Path], None], *, max_tries: int
) -> None:
    """Fill `target` by `receive`, which appends to a partial file and raises Interrupted for failures that may pass.

    Only tries that bring nothing count towards `max_tries`, because a long file may be cut often. A partial file is resumed only if the source
    identifies its content and still lists the same. Raises LoadFailed, Cancelled, and OSError for the local disk.
    """
    if target.exists():
        arrived(target.stat().st_size)
        return
    part, tag = target.with_name(target.name + ".part"), target.with_name(target.name + ".tag")
    identity = file.sha256 or file.md5 or file.digest
    stated = f"{file.size_bytes} {identity}"
    if part.exists() and (not identity or not tag.exists() or tag.read_text() != stated):
        part.unlink()
    tag.write_text(stated)
    if part.exists():
        arrived(part.stat().st_size)
    failures = 0
    while True:
        job.check()
        before_bytes = size_of(part)
        try:
            receive(part)
            break
        except Interrupted as error:
            failures = 1 if size_of(part) > before_bytes else failures + 1
            if failures >= max_tries:
                raise LoadFailed(f"{error.message}, after {max_tries} tries") from error
            job.wait(min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S))


def commit(file: RemoteFile, target: Path, job: PullJob) -> None:
    """Verify the partial file of `target` by what the source states of it, and give it its name. Raises LoadFailed and deletes it if it differs."""
    part = target.with_name(target.name + ".part")
    size_bytes = size_of(part)
    if file.size_bytes >= 0 and size_bytes != file.size_bytes:
        part.unlink(missing_ok=True)
        raise LoadFailed(f"{file.name}: {size_bytes} bytes came, the source lists {file.size_bytes}")
    name, expected = _checksum(file)
    if expected:
        actual = _digest(name, part, job)
        if actual != expected:
            part.unlink()
            raise LoadFailed(f"{file.name} is corrupt: its {name} is {actual}, the source gives {expected}")
    part.rename(target)
    target.with_name(target.name + ".tag").unlink(missing_ok=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _checksum(file: RemoteFile) -> tuple[str, str]:
    """Return the strongest checksum that the source gives. An object uploaded in parts has no MD5, and in Google's store a CRC32C."""
    for name, expected in (("sha256", file.sha256), ("md5", file.md5), ("crc32c", file.crc32c)):
        if expected:
            return name, expected
    return "", ""


def _digest(name: str, path: Path, job: PullJob) -> str:
    update: Callable[[bytes], None]
    result: Callable[[], str]
    if name == "crc32c":
        import google_crc32c  # installed with the library of the only store that gives it

        crc = google_crc32c.Checksum()
        update, result = crc.update, lambda: str(crc.hexdigest().decode())
    else:
        digest = hashlib.new(name, usedforsecurity=False)
        update, result = digest.update, digest.hexdigest
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            job.check()
            update(chunk)
    return result()
