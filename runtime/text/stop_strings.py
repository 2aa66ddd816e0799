"""Stop strings in text that comes in parts: what may be shown now, and whether it ends here. Pure; knows no tokens.

Text is held back exactly while it may be the beginning of a stop string that must not be shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """`text` may be shown; `stop` is the string that ended it, None while the text goes on."""

    text: str
    stop: str | None = None


class StopScanner:
    """One object a sequence.

    Of several matches in one part the one that starts first wins (then the first in the list), or, `by_list`, the first string
    of the list at its last place, as TGIS has it.
    """

    __slots__ = ("_by_list", "_include", "_keep", "_stops", "_tail", "_unsent")

    def __init__(self, stops: Sequence[str], *, include: bool = False, by_list: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._by_list = by_list
        self._keep = max(map(len, self._stops)) - 1
        self._tail = ""  # the newest text, long enough to complete a match
        self._unsent = 0  # letters at the tail's end that were not shown

    def push(self, text: str, *, check: bool = True) -> Match:
        """`check` False: this part can't end the text (too few tokens yet)."""
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
        """What is still held; the text ended otherwise."""
        text = self._tail[len(self._tail) - self._unsent :] if self._unsent else ""
        self._unsent = 0
        return text

    def _find(self, window: str, old: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            first = max(0, old - len(stop) + 1)  # it must take in something new
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
        """How long the longest beginning of a stop string is that the window ends with."""
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
