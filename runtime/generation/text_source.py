"""Provides text that arrives in pieces to parsers written as generators: a parser that needs more text yields, and continues with the next piece."""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

_T = TypeVar("_T")
Wait = Generator[None, None, _T]
_NOT_SPACE = re.compile(r"\S")


def before_space(text: str) -> int:
    """Return where the white space at the end of a text begins."""
    return len(text.rstrip())


def before_newline(text: str) -> int:
    """Return where the line end at the end of a text begins."""
    return len(text.removesuffix("\n"))


class TextSource:
    """The text that is not parsed yet. The text that a parser takes can be recorded, so that a failed parse can be shown as it was written."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._record: list[str] | None = None

    def feed(self, text: str) -> None:
        self.text += text

    def end(self) -> None:
        self.ended = True

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        if self._record is not None:
            self._record.append(taken)
        return taken

    def restore(self, text: str) -> None:
        """Put back what was taken last."""
        self.text = text + self.text

    def record(self, first: str = "") -> None:
        """Begin a new record with `first`."""
        self._record = [first]

    def recorded(self) -> str:
        """Return what was taken since the record began, and end the record."""
        taken, self._record = "".join(self._record or ()), None
        return taken

    def peek(self) -> Wait[str]:
        """Return the next character, which stays, or "" at the end."""
        while not self.text and not self.ended:
            yield
        return self.text[:1]

    def skip_space(self) -> Wait[None]:
        while True:
            found = _NOT_SPACE.search(self.text)
            self.take(found.start() if found else len(self.text))
            if found or self.ended:
                return
            yield

    def skip(self, literal: str) -> Wait[bool]:
        """Skip `literal` if the text begins with it, and return whether it does."""
        while len(self.text) < len(literal) and literal.startswith(self.text) and not self.ended:
            yield
        if not self.text.startswith(literal):
            return False
        self.take(len(literal))
        return True

    def up_to(self, literals: Sequence[str], limit: int | None = None) -> Wait[tuple[str, str] | None]:
        """Take the text before the first of `literals`, and the literal. None if it does not come within `limit` characters."""
        start, longest = 0, max(map(len, literals))
        while True:
            found = min(
                ((at, literal) for literal in literals if (at := self.text.find(literal, start)) >= 0), default=None
            )
            if found is not None and (limit is None or found[0] <= limit):
                before = self.take(found[0])
                self.take(len(found[1]))
                return before, found[1]
            if self.ended or (limit is not None and len(self.text) > limit + longest):
                return None
            start = max(0, len(self.text) - longest + 1)
            yield

    def stream(
        self, literals: Sequence[str], emit: Callable[[str], None], end_of: Callable[[str], int] = before_space
    ) -> Wait[tuple[str, str]]:
        """Emit the text before the first of `literals` as it comes, and take the literal.

        What follows `end_of(text)` is held back, since a literal may follow. Return it and the literal, "" at the end.
        """
        longest = max(map(len, literals), default=1)
        pattern = re.compile("|".join(map(re.escape, literals))) if literals else None
        while True:
            found = pattern.search(self.text) if pattern else None
            if found is not None:
                literal = found.group()
                body = self.take(found.start())
                self.take(len(literal))
            else:
                literal = ""
                kept = 0 if self.ended else self._begun(literals, longest)
                body = self.text[: len(self.text) - kept]
            cut = end_of(body)
            if cut:
                emit(body[:cut])
            if found is not None:
                return body[cut:], literal
            self.take(len(body) if self.ended else cut)
            if self.ended:
                return body[cut:], ""
            yield

    def _begun(self, literals: Sequence[str], longest: int) -> int:
        """Return the length of the longest beginning of a literal that the text ends with."""
        text = self.text
        for count in range(min(longest - 1, len(text)), 0, -1):
            tail = text[-count:]
            if any(literal.startswith(tail) for literal in literals):
                return count
        return 0
