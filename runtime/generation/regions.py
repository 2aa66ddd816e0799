"""Divides text that arrives in pieces into the regions of a response template, by the rules of transformers' ResponseParser."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from runtime.text.response_template import Mark, Region, ResponseTemplate

_LOG = logging.getLogger(__name__)

# CPU time of the event loop that a checkpoint's patterns may take for one sequence. Afterwards they match nothing.
_SEARCH_S = 0.5
_SEARCH_S_PER_PIECE = 0.0002


@dataclass(frozen=True, slots=True)
class Opened:
    """A region begins. `mark`: the text that opened it."""

    region: Region
    mark: str = ""
    captures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of the region that is open."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The region that is open ends. `captures`: of its closing mark."""

    mark: str = ""
    captures: dict[str, str] = field(default_factory=dict)


Event = Opened | Piece | Closed


class RegionScanner:
    """Finds regions. What may be the beginning of a mark is held back until more text decides it."""

    def __init__(self, template: ResponseTemplate) -> None:
        self._rest = template.rest
        self._explicit = [region for region in template.regions if region.opening is not None]
        self._text = ""
        self._at = 0
        self._current: Region | None = template.rest
        self._is_open = False
        self._search_s = _SEARCH_S  # what is left of the patterns' time

    def feed(self, text: str) -> list[Event]:
        self._text += text
        if self._search_s > 0:
            self._search_s += _SEARCH_S_PER_PIECE
        return list(self._advance(ended=False))

    def end(self) -> list[Event]:
        """Return what was held back, and close the region that is open."""
        return list(self._advance(ended=True))

    def _advance(self, *, ended: bool) -> Iterator[Event]:
        while True:
            found, held = self._find(ended=ended)
            if found is None:
                yield from self._take(len(self._text) if ended else held)
                if ended:
                    yield from self._close("", {})
                return
            region, opens, match = found
            yield from self._take(match.start())
            self._at = match.end()
            captures = {name: text for name, text in match.groupdict().items() if text is not None}
            if opens:
                yield from self._close("", {})
                self._current, self._is_open = region, True
                yield Opened(region, match.group(), captures)
                continue
            was_open = self._is_open
            yield from self._close(match.group(), captures)
            if not was_open and not match.group():
                # An empty mark after nothing would be found again.
                if ended:
                    yield from self._take(len(self._text))
                    yield from self._close("", {})
                return

    def _take(self, end: int) -> Iterator[Event]:
        text, self._at = self._text[self._at : end], max(self._at, end)
        if not text or self._current is None:
            return
        if not self._is_open:
            self._is_open = True
            yield Opened(self._current)
        yield Piece(text)

    def _close(self, mark: str, captures: dict[str, str]) -> Iterator[Event]:
        if self._current is not None and self._is_open:
            yield Closed(mark, captures)
        self._current, self._is_open = self._rest, False

    def _watched(self) -> Iterator[tuple[Region, bool, Mark]]:
        """Return the marks that count now, each with its region and whether it opens it."""
        if self._current is not None and self._current is not self._rest:
            if self._current.closing is not None:
                yield self._current, False, self._current.closing
            return
        for region in self._explicit:
            if region.opening is not None:
                yield region, True, region.opening
        if self._rest is not None and self._rest.closing is not None:
            yield self._rest, False, self._rest.closing

    def _find(self, *, ended: bool) -> tuple[tuple[Region, bool, Any] | None, int]:
        """Return the first mark that more text cannot change, and where the first one that it may change begins.

        Of marks at one place the longest wins, then one that opens a region.
        """
        best: tuple[Region, bool, Any] | None = None
        best_key: tuple[int, int, bool, str] | None = None
        held = len(self._text)
        for region, opens, mark in self._watched():
            match = self._timed(mark, mark.pattern.search, self._text, self._at, partial=not ended)
            if match is None:
                continue
            if not ended and (match.partial or self._may_change(mark, match)):
                held = min(held, match.start())
                continue
            key = (match.start(), match.start() - match.end(), not opens, region.name)
            if best_key is None or key < best_key:
                best, best_key = (region, opens, match), key
        if best is not None and best[2].start() >= held:
            best = None
        return best, held

    def _may_change(self, mark: Mark, match: Any) -> bool:
        """Whether text that follows could move or undo a match."""
        if match.end() < len(self._text):
            if mark.is_literal:
                return False
            # A pattern can look at the end of the text from further away.
            again = self._timed(mark, mark.pattern.match, self._text + "\0", match.start())
            return again is None or again.span() != match.span() or again.groupdict() != match.groupdict()
        return not match.group() or not mark.is_literal or mark.extends

    def _timed(self, mark: Mark, look: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the match that `look`, of the mark's pattern, finds, or None once the patterns of this sequence have taken too long."""
        if self._search_s <= 0:
            return None
        began_s = time.thread_time()
        try:
            found = look(*arguments, **options, timeout=self._search_s)
        except TimeoutError:
            found, self._search_s = None, 0.0
        else:
            self._search_s -= time.thread_time() - began_s
        if self._search_s <= 0:
            _LOG.warning(
                "the patterns of the checkpoint's response_template took more than %g s of one answer, whose rest is read "
                "without them; the last pattern was %.200r",
                _SEARCH_S,
                mark.pattern.pattern,
            )
        return found
