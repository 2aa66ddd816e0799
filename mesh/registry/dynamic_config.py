"""Follows ModelMesh's dynamic settings: the keys below `config/` in the store, whose values are plain text."""

import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing

from mesh.errors import Unavailable
from mesh.store.protocol import EntryDeleted, EntryPut, Relisted, Store

logger = logging.getLogger(__name__)

DISABLE_KEY = "disable"

Apply = Callable[[str | None], None]


class DynamicConfig:
    """`settings`: what applies the value of a key. It is called with None when the key is deleted."""

    def __init__(self, store: Store, prefix: str, settings: Mapping[str, Apply]) -> None:
        self._store = store
        self._prefix = prefix
        self._settings = settings
        self._values: dict[str, str] = {}

    async def check_enabled(self) -> None:
        """Raise Unavailable if an operator has disabled the mesh, and StoreError."""
        entry = await self._store.get(self._prefix + DISABLE_KEY)
        if entry is not None and entry.value != b"false":
            raise Unavailable(
                f"this mesh is disabled by the key {self._prefix}{DISABLE_KEY} in the store; delete it or set it to false"
            )

    async def run(self) -> None:
        """Apply each change until cancelled."""
        async with aclosing(self._store.watch(self._prefix)) as events:
            async for event in events:
                match event:
                    case EntryPut(entry):
                        self._set(entry.key, entry.value)
                    case EntryDeleted(key):
                        self._delete(key)
                    case Relisted(listing):
                        listed = {entry.key for entry in listing.entries}
                        for name in [name for name in self._values if self._prefix + name not in listed]:
                            self._delete(self._prefix + name)
                        for entry in listing.entries:
                            self._set(entry.key, entry.value)

    def _set(self, key: str, value: bytes) -> None:
        name, text = key.removeprefix(self._prefix), value.decode(errors="replace")
        if self._values.get(name) == text:
            return
        self._values[name] = text
        if (apply := self._settings.get(name)) is None:
            logger.warning("the dynamic setting %s has no effect", name)
        else:
            logger.info("the dynamic setting %s is now %s", name, text)
            apply(text)

    def _delete(self, key: str) -> None:
        name = key.removeprefix(self._prefix)
        if self._values.pop(name, None) is not None and (apply := self._settings.get(name)) is not None:
            logger.info("the dynamic setting %s is unset", name)
            apply(None)
