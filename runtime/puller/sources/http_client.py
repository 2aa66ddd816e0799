"""Fetches files over HTTP: ranges, resuming, retries, checks of addresses and contents."""

import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO

from runtime.errors import LoadFailed
from runtime.puller.progress import PullJob
from runtime.puller.source import Arrived, RemoteFile, Unreachable
from runtime.puller.sources.checked_connections import checked_handlers
from runtime.puller.sources.destinations import Destinations
from runtime.puller.sources.transfer import Interrupted, commit, size_of, transfer

_CHUNK_BYTES = 1024 * 1024
_TIMEOUT_S = 60.0
_TRIES = 6
_SMALL_TRIES = 3
AGAIN = (408, 425, 429, 500, 502, 503, 504)
# A URL or header that cannot be used raises a ValueError whose text quotes it.
_BROKEN = (OSError, http.client.HTTPException, ValueError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Sends a token to the host that it was given for, over TLS, and never to the target of a redirect."""

    def __init__(self, secret: frozenset[str]) -> None:
        self._secret = secret

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if following is not None:
            old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
            if new.scheme not in ("http", "https"):
                raise LoadFailed(f"{_shown(req.full_url)} redirects to {_shown(newurl)}, which is not HTTP")
            if new.netloc != old.netloc or (new.scheme == "http" and old.scheme == "https"):
                for name in list(following.headers):
                    if name.lower() in self._secret:
                        del following.headers[name]
            following.method = req.get_method()
        return following


@dataclass(frozen=True, slots=True)
class HttpClient:
    """`headers` go with every request to the URL's own host, and to no other. `context` None = the system's certificates.

    `destinations`: where the URL and each redirect may lead.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | None = None
    destinations: Destinations = field(default_factory=Destinations)

    def open(
        self, url: str, job: PullJob, *, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Raises HTTPError, URLError, OSError, ValueError."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise LoadFailed(f"{_shown(url)} is not HTTP")
        opener = urllib.request.build_opener(
            _Redirects(frozenset(name.lower() for name in self.headers)),
            *checked_handlers(self.destinations, self.context or ssl.create_default_context(), job),
        )
        merged = {"User-Agent": "repertory", "Accept-Encoding": "identity", **self.headers, **(headers or {})}
        response = opener.open(urllib.request.Request(url, headers=merged, method=method), timeout=_TIMEOUT_S)
        assert isinstance(response, http.client.HTTPResponse)
        return response

    def look(self, name: str, url: str, job: PullJob) -> RemoteFile | None:
        """Size and ETag of a file; None if there is not one. Raises LoadFailed when the server cannot be asked."""
        try:
            try:
                response = self._open_patiently(url, "HEAD", {}, job)
            except urllib.error.HTTPError as error:
                # a signed URL is signed for GET alone
                if error.code not in (403, 405, 501):
                    raise
                response = self._open_patiently(url, "GET", {"Range": "bytes=0-0"}, job)
            with response:
                return _described(name, url, response.headers)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                return None
            kind = Unreachable if error.code in AGAIN else LoadFailed
            raise kind(f"{_shown(url)}: the server answers {error.code} {error.reason}") from error
        except _BROKEN as error:
            job.check()
            raise Unreachable(f"{_shown(url)} cannot be reached: {_words(error)}") from None

    def read(self, url: str, start: int, count: int, job: PullJob) -> bytes:
        """Read a few bytes. Raises LoadFailed."""
        try:
            with self._open_patiently(url, "GET", {"Range": f"bytes={start}-{start + count - 1}"}, job) as response:
                if response.status != 206 and start:
                    raise LoadFailed(f"{_shown(url)}: the server gives no parts of files")
                return response.read(count)
        except _BROKEN as error:
            job.check()
            raise LoadFailed(f"{_shown(url)} cannot be read: {_words(error)}") from None

    def _open_patiently(
        self, url: str, method: str, headers: Mapping[str, str], job: PullJob
    ) -> http.client.HTTPResponse:
        """Open a URL, trying again for a server that is busy. Raises Cancelled between tries."""
        attempt = 0
        while True:
            job.check()
            try:
                return self.open(url, job, method=method, headers=headers)
            except urllib.error.HTTPError as error:
                attempt += 1
                if error.code not in AGAIN or attempt == _SMALL_TRIES:
                    raise
                error.close()
            job.wait(0.25 * 2 ** (attempt - 1))

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        """Bring a file, resuming an earlier try if it is still the same file. Raises LoadFailed, and OSError for the local disk."""
        transfer(file, target, job, arrived, lambda part: self._receive(file, part, job, arrived), max_tries=_TRIES)
        if not target.exists():
            commit(file, target, job)

    def _receive(self, file: RemoteFile, done: Path, job: PullJob, arrived: Arrived) -> None:
        start = size_of(done)
        if start and 0 <= file.size_bytes <= start:
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and file.digest.startswith('"'):
            headers["If-Range"] = file.digest
        try:
            response = self.open(file.location, job, headers=headers)
        except urllib.error.HTTPError as error:
            if error.code in AGAIN:
                raise Interrupted(f"{_shown(file.location)}: the server answers {error.code}") from error
            raise LoadFailed(f"{_shown(file.location)}: the server answers {error.code} {error.reason}") from error
        except _BROKEN as error:
            raise Interrupted(f"{_shown(file.location)}: cannot be reached: {_words(error)}") from None
        with response, done.open("ab" if response.status == 206 else "wb") as out:
            if response.status != 206 and start:
                arrived(-start)  # it changed, or the server gives no parts: from the beginning
                start = 0
            expected = response.length  # None without a numeric Content-Length
            received = 0
            while True:
                job.check()
                try:
                    chunk = response.read1(_CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise Interrupted(
                        f"{_shown(file.location)}: cut off after {start + received} bytes: {error}"
                    ) from error
                if not chunk:
                    break
                out.write(chunk)
                received += len(chunk)
                arrived(len(chunk))
                if 0 <= file.size_bytes < start + received:
                    return  # The rest could fill the disk. The size shows that it is not the file.
            if expected is not None and received < expected:
                raise Interrupted(
                    f"{_shown(file.location)}: cut off after {start + received} of {start + expected} bytes"
                )


def _described(name: str, url: str, headers: Message) -> RemoteFile:
    size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    digest = headers.get("ETag") or headers.get("Last-Modified") or ""
    return RemoteFile(name, url, int(size) if size.isdigit() else -1, digest)


def _words(error: Exception) -> str:
    """Return the library's message without the request that it quotes, with query and headers."""
    if isinstance(error, http.client.InvalidURL | ValueError):
        return f"the address or a header of it is not valid ({type(error).__name__})"
    return str(error.reason) if isinstance(error, urllib.error.URLError) else str(error)


def _shown(url: str) -> str:
    """Return the URL without query and user, which may be secrets."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
