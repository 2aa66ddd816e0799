"""Models in object stores, whichever: a thin adapter lists and reads ranges (s3.py, gcs.py, azure.py), the rest is the same for all.

Resumes and checks downloads, chooses files, and reports errors without secrets.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from runtime.errors import LoadFailed, RepertoryError
from runtime.puller.progress import PullJob
from runtime.puller.source import Arrived, Listing, RemoteFile, Unreachable, checked_name, refuse_split, wanted
from runtime.puller.sources.transfer import Interrupted, commit, size_of, transfer

_CHUNK_BYTES = 8 * 1024 * 1024
_TRIES = 4


class Bucket(Protocol):
    """`origin` names it to people; `away` are the library's errors that mean that the store was not reached at all."""

    origin: str
    away: tuple[type[Exception], ...]

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        """Objects by full key in `name` and `location`."""

    def checkable(self, file: RemoteFile) -> RemoteFile:
        """Return the object with the checksums that the store gives for it or gave in the list."""

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        """Read `count` bytes from `start`. Raises an error of any type if the object is no longer the one that was listed."""


class BucketSource:
    """The files below one prefix of a bucket; or one object, if the prefix is a .gguf file."""

    def __init__(self, bucket: Bucket, prefix: str, *, allow_pickle: bool) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._allow_pickle = allow_pickle

    def listing(self, job: PullJob) -> Listing:
        origin = f"{self._bucket.origin}/{self._prefix}"
        files: list[RemoteFile] = []
        with _told(origin, "listed", self._bucket.away):
            for found in self._bucket.list(self._prefix):
                job.check()
                if found.name == self._prefix:
                    name = Path(found.name).name
                elif not self._prefix or found.name.startswith(f"{self._prefix}/"):
                    name = found.name[len(self._prefix) :].lstrip("/")
                else:
                    continue
                if name and not name.endswith("/") and found.size_bytes:
                    files.append(replace(found, name=checked_name(name, origin)))
        if not files:
            raise LoadFailed(f"{origin}: nothing is there")
        if len(files) == 1 and files[0].name.endswith(".gguf"):
            refuse_split(files[0].name, origin)
            return Listing(origin, files)
        return Listing(origin, wanted(files, origin, allow_pickle=self._allow_pickle))

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        transfer(file, target, job, arrived, lambda part: self._receive(file, part, job, arrived), max_tries=_TRIES)
        if not target.exists():
            with _told(f"{self._bucket.origin}/{file.location}", "checked"):
                file = self._bucket.checkable(file)
            commit(file, target, job)

    def _receive(self, file: RemoteFile, part: Path, job: PullJob, arrived: Arrived) -> None:
        """Append what is missing, one range after another. The store refuses a range of an object that has changed."""
        place = f"{self._bucket.origin}/{file.location}"
        start = size_of(part)
        with part.open("ab") as out:
            while start < file.size_bytes:
                job.check()
                try:
                    with _told(place, "read"):
                        chunk = self._bucket.read(file, start, min(_CHUNK_BYTES, file.size_bytes - start))
                except LoadFailed as error:
                    raise Interrupted(error.message) from error
                if not chunk:
                    raise Interrupted(f"{place}: ended after {start} of {file.size_bytes} bytes")
                out.write(chunk)
                out.flush()
                start += len(chunk)
                arrived(len(chunk))

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        with _told(f"{self._bucket.origin}/{file.location}", "read"):
            return self._bucket.read(file, start, count)


def missing_extra(extra: str, package: str) -> RepertoryError:
    return LoadFailed(f"reading from this store needs {package}: install repertory[{extra}]")


_QUERY = re.compile(r"\?[^\s'\")<>]+=[^\s'\")<>]+")  # of a URL: it may hold a signature
_USER = re.compile(r"(?<=//)[^\s/@]*@")
_MOST_WORDS = 400


@contextlib.contextmanager
def _told(place: str, verb: str, away: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Convert an exception of a library to one of ours, which names the place and contains no secret."""
    try:
        yield
    except RepertoryError:
        raise
    except Exception as error:
        words = _USER.sub("", _QUERY.sub("?…", " ".join(str(error).split())))[:_MOST_WORDS]
        kind = Unreachable if isinstance(error, away) else LoadFailed
        raise kind(f"{place} cannot be {verb}: {type(error).__name__}: {words}") from None
