"""Decides which pods may load a model of a type, by the pods' labels: ModelMesh's MM_TYPE_CONSTRAINTS.

    {"rt:gpu": {"required": ["gpu"], "preferred": ["zone-a|zone-b"]}, "_default": {}}

A pod meets an entry of alternatives, `a|b`, if it has one of them.
"""

from collections.abc import Collection, Mapping

import msgspec

from common.reloaded_setting import ReloadedSetting

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
    """Applies the setting `text`: JSON, `@FILE`, or empty for none. Raises ConfigError if it is invalid. A file is read again when it changes."""

    def __init__(self, text: str, *, check_s: float = 1.0) -> None:
        self._by_type = ReloadedSetting[Mapping[str, Constraint]](
            "type_constraints", text, _parse, default={}, check_s=check_s
        )

    def of(self, model_type: str) -> Constraint:
        by_type = self._by_type.value
        return by_type.get(model_type) or by_type.get(_DEFAULT_TYPE) or Constraint()


def _parse(content: bytes) -> Mapping[str, Constraint]:
    return msgspec.json.decode(content, type=dict[str, Constraint])


def _meets(labels: Collection[str], entry: str) -> bool:
    return any(alternative.strip() in labels for alternative in entry.split("|"))
