"""Names the fields inside content parts of messages that this API does not know, for the `Warning` header."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The fields of each kind of part that is served. Parts of other kinds are refused, whatever fields they have.
FIELDS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"type", "text"}),
    "input_text": frozenset({"type", "text"}),
    "output_text": frozenset({"type", "text", "annotations", "logprobs"}),
    "refusal": frozenset({"type", "refusal"}),
    "reasoning_text": frozenset({"type", "text"}),
    "summary_text": frozenset({"type", "text"}),
}


def unknown_in_parts(path: str, parts: Any, known: Mapping[str, frozenset[str]] = FIELDS) -> Iterator[str]:
    """Yield the paths of fields of `parts`, under `path`, that their kind does not have and that are not null."""
    if not isinstance(parts, list):
        return
    for index, part in enumerate(parts):
        if isinstance(part, dict) and (fields := known.get(str(part.get("type", "text")))) is not None:
            yield from (f"{path}.{index}.{name}" for name in unknown_names(part, fields))


def unknown_names(fields: Mapping[str, Any], known: Iterable[str]) -> Iterator[str]:
    """Yield the names in `fields` that are not known and whose values are not null."""
    names = frozenset(known)
    yield from (name for name, value in fields.items() if name not in names and value is not None)
