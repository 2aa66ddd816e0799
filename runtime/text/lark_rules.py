"""Collects the Lark rules and the embedded parts of one grammar."""

import re
from collections.abc import Mapping, Sequence

from runtime.text.constraint import Part, quoted

_ANY_TEXT = "/(.|\\n)*/"


class Rules:
    """`marker_ids`: texts that are tokens of their own, which no other text of the grammar has."""

    def __init__(self, marker_ids: Mapping[str, int]) -> None:
        self.parts: dict[str, Part] = {}
        self._lines: list[str] = []
        self._num_names = 0
        self._marker_ids = dict(marker_ids)
        longest_first = sorted(marker_ids, key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if marker_ids else None

    def add(self, body: str, name: str = "", options: str = "") -> str:
        """Add a rule and return its name."""
        name = name or self.new_name()
        self._lines.append(f"{name}{options}: {body}")
        return name

    def new_name(self) -> str:
        """Return a name for a rule that is added later, because it refers to itself."""
        self._num_names += 1
        return f"r{self._num_names}"

    def part(self, part: Part) -> str:
        """Embed another grammar and return the reference to it."""
        name = f"p{len(self.parts)}"
        self.parts[name] = part
        return f"@{name}"

    def literal(self, text: str) -> str:
        """Return an expression that matches exactly this text."""
        pieces = self._markers.split(text) if self._markers is not None else [text]
        found = [self._piece(piece) for piece in pieces if piece]
        return " ".join(found) or quoted("")

    def marks(self, text: str) -> bool:
        """Whether a text begins with a marker that is a token."""
        return any(text.startswith(marker) for marker in self._marker_ids)

    def text_before(self, end: str) -> str:
        """Return an expression for any text, up to and with the first `end`."""
        first = next((marker for marker in self._marker_ids if end.startswith(marker)), None)
        if first is not None:
            return f"{_ANY_TEXT} {self.literal(end)}"
        return self.add(f"{_ANY_TEXT} {quoted(end)}", options="[lazy]")

    def optional_members(self, members: Sequence[tuple[str, bool]], separator: str) -> str:
        """Return an expression for expressions in this order, with `separator` between them. Those whose flag is false may be left out."""
        between = self.literal(separator)
        after = first = self.literal("")
        for member, required in reversed(members):
            follows = self.add(after)
            opens = self.add(f"{member} {follows}" if required else f"{member} {follows} | {first}")
            after = f"{between} {member} {follows}" if required else f"({between} {member})? {follows}"
            first = opens
        return first

    def text(self, start: str) -> str:
        """Return the grammar's text with this start rule."""
        return "\n".join([f"start: {start}", *self._lines])

    def _piece(self, piece: str) -> str:
        token_id = self._marker_ids.get(piece)
        return quoted(piece) if token_id is None else f"<[{token_id}]>"
