"""Provides the secret by which pods of one mesh recognise each other's requests. It is kept in the store that they share.

Only peers may say that a request was forwarded already, or when a model was last used. The secret is separate from the callers' keys, so changing
those never fails a hop.
"""

import contextlib
import hmac
import logging
import secrets

from mesh.access.api_keys import digest_of
from mesh.errors import StoreError
from mesh.store.protocol import ABSENT, Compare, EntryDeleted, EntryPut, Put, Relisted, Store

logger = logging.getLogger(__name__)

HOP_HEADER = "repertory-hop"  # the id of the pod that forwarded the request, which is not forwarded again
PEER_KEY_HEADER = "repertory-peer-key"
PEER_HEADERS = frozenset({HOP_HEADER, PEER_KEY_HEADER})

_KEY_BYTES = 32


class PeerKeys:
    """`key`: where the store has the secret. After a change the secret before it is still accepted, so pods may learn of it one by one."""

    def __init__(self, store: Store, key: str, own_id: str) -> None:
        self._store = store
        self._key = key
        self._own_id = own_id
        self._current = ""
        self._previous = ""

    async def start(self) -> None:
        """Read the secret, or create it for the whole mesh. Raises StoreError."""
        entry = await self._store.get(self._key)
        if entry is not None:
            self._adopt(entry.value)
            return
        fresh = (self._current or secrets.token_urlsafe(_KEY_BYTES)).encode()
        result = await self._store.txn([Compare(self._key, mod_revision=ABSENT)], [Put(self._key, fresh)])
        known = result.current[0] if result.current else None
        self._adopt(fresh if result.succeeded or known is None else known.value)

    async def run(self) -> None:
        """Follow changes of the secret."""
        async with contextlib.aclosing(self._store.watch(self._key)) as events:
            async for event in events:
                match event:
                    case EntryPut(entry) if entry.key == self._key:
                        self._adopt(entry.value)
                    case EntryDeleted(key) if key == self._key:
                        await self._restore()
                    case Relisted(listing):
                        found = [entry for entry in listing.entries if entry.key == self._key]
                        if found:
                            self._adopt(found[0].value)
                        else:
                            await self._restore()

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers of a request to another pod."""
        return [(HOP_HEADER, self._own_id), (PEER_KEY_HEADER, self._current)]

    def digests(self) -> tuple[str, ...]:
        """Return the SHA-256 of the secrets that are accepted."""
        return tuple(digest_of(known) for known in (self._current, self._previous) if known)

    def recognises(self, sent: str) -> bool:
        """Return whether a request with this value of the key header comes from a pod of the mesh. Compares in constant time."""
        given = sent.encode(errors="surrogateescape")
        matches = [hmac.compare_digest(given, known.encode()) for known in (self._current, self._previous) if known]
        return any(matches)

    def _adopt(self, value: bytes) -> None:
        text = value.decode(errors="replace")
        if text and text != self._current:
            self._previous, self._current = self._current, text

    async def _restore(self) -> None:
        try:
            await self.start()
        except StoreError as error:
            logger.warning("the pods' shared secret could not be written: %s", error.message)
