"""Finds the key that a caller sends, among the keys of the configuration and of a file that is read again when it changes."""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from common.errors import ConfigError
from common.watched_files import WatchedFiles
from mesh.access.api_keys import ApiKey, digest_of, plain_keys, read_key_file

logger = logging.getLogger(__name__)

_POLL_S = 1.0


class KeyTable:
    """`values`: keys in plain text that allow everything. `file`: empty for none. Raises ConfigError for an invalid file."""

    def __init__(self, values: Sequence[str], file: str, *, poll_s: float = _POLL_S) -> None:
        self._plain = plain_keys(values)
        self._file = file
        self._poll_s = poll_s
        self._watched = WatchedFiles([file] if file else [])
        self._by_digest: dict[str, ApiKey] = {}
        self._fill(read_key_file(file) if file else ())

    @property
    def is_required(self) -> bool:
        """Whether callers need a key. With an empty file all callers are refused."""
        return bool(self._plain or self._file)

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret. The lookup is by hash, so its duration says nothing about the secrets."""
        return self._by_digest.get(digest_of(secret)) if secret else None

    def find_first(self, secrets: Iterable[str]) -> ApiKey | None:
        """Return the key of the first known secret. Callers may send several over HTTP."""
        return next((key for secret in secrets if (key := self.find(secret)) is not None), None)

    def named(self, name: str) -> ApiKey | None:
        return next((key for key in self._by_digest.values() if key.name == name), None)

    def all(self) -> tuple[ApiKey, ...]:
        """Return the keys, each once."""
        return tuple({key.name: key for key in self._by_digest.values()}.values())

    async def run(self) -> None:
        """Follow changes of the file. An invalid file is logged, and the keys before it stay valid."""
        while self._file:
            await asyncio.sleep(self._poll_s)
            if await asyncio.to_thread(self._watched.changed):
                await self._reload()

    async def _reload(self) -> None:
        try:
            keys = await asyncio.to_thread(read_key_file, self._file)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        self._fill(keys)
        logger.info("%d keys were read from %s", len(keys), self._file)

    def _fill(self, keys: Sequence[ApiKey]) -> None:
        self._by_digest = {digest: key for key in (*self._plain, *keys) for digest in key.digests}
