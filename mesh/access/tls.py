"""Holds a certificate with its key, and the authority that peers must have, and reads the files again when they are replaced."""

import asyncio
import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.watched_files import WatchedFiles

logger = logging.getLogger(__name__)

_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM texts. An empty `authority` stands for none."""

    certificate: bytes
    key: bytes
    authority: bytes


class TlsIdentity:
    """The files of one identity: certificate chain, key and, for mutual TLS, authority. Raises ConfigError if they cannot be used.

    `authority`: one file, or several separated by commas.

    New connections use the newest files, and running ones are not touched. `generation` counts the changes.
    """

    def __init__(self, certificate: str, key: str, authority: str = "", *, poll_s: float = _POLL_S) -> None:
        self._certificate = certificate
        self._key = key
        self._authorities = tuple(path for path in authority.split(",") if path)
        self._poll_s = poll_s
        self._watched = WatchedFiles([certificate, key, *self._authorities])
        self._contexts: list[ssl.SSLContext] = []
        self._is_stale = False
        self.generation = 0
        self.material = self._read()

    def server_context(self) -> ssl.SSLContext:
        """Return a context for a server, which requires a certificate of the client if there is an authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._authorities:
            context.verify_mode = ssl.CERT_REQUIRED
        return self._followed(context)

    def client_context(self) -> ssl.SSLContext:
        """Return a context for connections to servers whose certificates the authority has signed."""
        return self._followed(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    async def run(self) -> None:
        """Follow changes of the files. Files that do not fit together are logged once and tried again."""
        while True:
            await asyncio.sleep(self._poll_s)
            if await asyncio.to_thread(self._watched.changed) or self._is_stale:
                await self._reload()

    async def _reload(self) -> None:
        try:
            self.material = await asyncio.to_thread(self._read)
        except ConfigError as error:
            # A certificate and its key are two files, so one may have been replaced before the other.
            if not self._is_stale:
                logger.warning("the certificate stays as it was: %s", error)
            self._is_stale = True
            return
        self._is_stale = False
        self.generation += 1
        for context in self._contexts:
            self._load(context)
        logger.info("read the certificate %s again", self._certificate)

    def _followed(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # As in gRPC, a certificate may be trusted by itself, without the one that signed it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._load(context)
        self._contexts.append(context)
        return context

    def _read(self) -> TlsMaterial:
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            return TlsMaterial(
                Path(self._certificate).read_bytes(),
                Path(self._key).read_bytes(),
                b"\n".join(Path(path).read_bytes() for path in self._authorities),
            )
        except ssl.SSLError as error:
            files = ", ".join((self._certificate, self._key, *self._authorities))
            raise ConfigError(f"TLS files {files}: they cannot be used together ({error.reason or 'no PEM'})") from None
        except OSError as error:
            raise ConfigError(f"TLS file {error.filename or self._certificate}: {error.strerror}") from None

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._certificate, self._key)
        for authority in self._authorities:
            context.load_verify_locations(authority)
