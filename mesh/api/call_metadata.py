"""Provides the metadata of a gRPC call by key. It is read from the transport once, and looked up several times."""

from collections.abc import Sequence

from mesh.errors import InvalidRequest

Metadata = Sequence[tuple[str, str | bytes]]


class CallMetadata:
    """`pairs`: the metadata in the caller's order."""

    __slots__ = ("_first", "pairs")

    def __init__(self, pairs: Metadata) -> None:
        self.pairs = pairs
        self._first = dict(reversed(pairs))

    def __contains__(self, key: str) -> bool:
        return key in self._first

    def first(self, key: str) -> str:
        """Return the first value of a key; empty without one. Raises InvalidRequest if it is not UTF-8."""
        value = self._first.get(key, "")
        return value if isinstance(value, str) else _text(value)

    def all(self, key: str) -> list[str]:
        """Return all values of a key in their order. Raises InvalidRequest if one is not UTF-8."""
        if key not in self._first:
            return []
        return [value if isinstance(value, str) else _text(value) for at, value in self.pairs if at == key]


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the model id header is not UTF-8") from None
