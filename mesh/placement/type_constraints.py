"""Decides which pods may load a model of a type, by the pods' labels: ModelMesh's MM_TYPE_CONSTRAINTS.

    {"rt:gpu": {"required": ["gpu"], "preferred": ["zone-a|zone-b"]}, "_default": {}}

A pod meets an entry of alternatives, `a|b`, if it has one of them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from common.errors import ConfigError

_DEFAULT_TYPE = "_default"


class Constraint(msgspec.Struct, frozen=True):
    required: tuple[str, ...] = ()
    preferred: tuple[str, ...] = ()

    def allows(self, labels: Collection[str]) -> bool:
        return all(_meets(labels, entry) for entry in self.required)

    def num_preferred(self, labels: Collection[str]) -> int:
        """Return how many preferred entries the labels meet."""
        return sum(_meets(labels, entry) for entry in self.preferred)


class TypeConstraints:
    """Constraints by type. `text`: JSON, `@FILE`, or empty. A changed file is read again. Raises ConfigError for invalid text."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._mtime_ns = 0
        self._by_type: Mapping[str, Constraint] = {}
        if self._file is not None:
            self._read_file(self._file)
        elif text:
            self._by_type = _parse(text.encode(), "type_constraints")

    def of(self, model_type: str) -> Constraint:
        if self._file is not None:
            self._read_file(self._file)
        return self._by_type.get(model_type) or self._by_type.get(_DEFAULT_TYPE) or Constraint()

    def _read_file(self, file: Path) -> None:
        try:
            mtime_ns = file.stat().st_mtime_ns
            if mtime_ns == self._mtime_ns:
                return
            content = file.read_bytes()
        except OSError as error:
            if self._by_type:
                return  # The file is being replaced, so its last content stays valid.
            raise ConfigError(f"type_constraints file {file}: {error.strerror}") from None
        self._by_type, self._mtime_ns = _parse(content, f"type_constraints file {file}"), mtime_ns


def _parse(content: bytes, what: str) -> dict[str, Constraint]:
    try:
        return msgspec.json.decode(content, type=dict[str, Constraint])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{what}: {error}") from None


def _meets(labels: Collection[str], entry: str) -> bool:
    return any(alternative.strip() in labels for alternative in entry.split("|"))
