"""Finds stop strings in text that comes in pieces.

Text is held back exactly as long as it may be the beginning of a stop string that must not be shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """`text` may be shown. `stop` is the stop string that ended it, None if the text continues."""

    text: str
    stop: str | None = None


class StopScanner:
    """Scans one sequence.

    Of several matches in one piece the one that starts first wins, then the first in the list. With `by_list`, the first string in the list
    wins, at its last position, as in TGIS.
    """

    __slots__ = ("_by_list", "_include", "_keep", "_stops", "_tail", "_unsent")

    def __init__(self, stops: Sequence[str], *, include: bool = False, by_list: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._by_list = by_list
        self._keep = max(map(len, self._stops)) - 1
        self._tail = ""  # the newest text, long enough to complete a match
        self._unsent = 0  # characters at the tail's end that were not shown

    def push(self, text: str, *, check: bool = True) -> Match:
        """Scan a piece. With `check` False it cannot end the text, because too few tokens were generated."""
        if not text:
            return Match("")
        window = self._tail + text
        unshown = len(self._tail) - self._unsent
        if check:
            found = self._find(window, len(self._tail))
            if found is not None:
                start, stop = found
                end = start + len(stop) if self._include else start
                self._tail, self._unsent = "", 0
                return Match(window[unshown:end], stop)
        held = self._held(window)
        self._tail = window[-self._keep :] if self._keep else ""
        self._unsent = held
        return Match(window[unshown : len(window) - held])

    def flush(self) -> str:
        """Return the text that is still held, after the sequence ended for another reason."""
        text = self._tail[len(self._tail) - self._unsent :] if self._unsent else ""
        self._unsent = 0
        return text

    def _find(self, window: str, old: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            first = max(0, old - len(stop) + 1)  # a match must include new text
            if self._by_list:
                start = window.rfind(stop, first)
                if start >= 0:
                    return start, stop
            else:
                start = window.find(stop, first)
                if start >= 0 and (best is None or start < best[0]):
                    best = (start, stop)
        return best

    def _held(self, window: str) -> int:
        """Return the length of the longest beginning of a stop string that the window ends with."""
        longest = 0
        if self._include:
            return longest
        last = window[-1]
        for stop in self._stops:
            if last not in stop:
                continue
            start = max(0, len(window) - len(stop) + 1)
            while (start := window.find(stop[0], start)) >= 0 and len(window) - start > longest:
                if stop.startswith(window[start:]):
                    longest = len(window) - start
                start += 1
        return longest
