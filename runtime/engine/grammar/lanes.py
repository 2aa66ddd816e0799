"""Keeps the grammars that have been built, so that further sequences with the same grammar get copies.

Copies of a matcher share its lexer, which one thread at a time may use, so their masks cannot be computed at once. A grammar that many sequences follow
is therefore built several times. Each of these lanes can compute masks beside the others.
"""

import itertools
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from runtime.engine.grammar.guided_sequence import GuidedSequence
from runtime.engine.grammar.tokenizer import GrammarTokenizer
from runtime.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

SEQUENCES_EACH = 4  # of a lane before another one is built
_KEPT_LANES = 64  # about a megabyte each


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """A grammar that was built once. Its matcher stays at the beginning of the text."""

    number: int
    matcher: "LLMatcher"
    sequences: WeakSet[GuidedSequence] = field(default_factory=WeakSet)

    def open(self, tokenizer: GrammarTokenizer, grammar: Grammar) -> GuidedSequence:
        """Begin a sequence, which counts as one of the lane's for as long as it is referenced."""
        sequence = GuidedSequence(self.matcher.deep_copy(), tokenizer, grammar, self.number)
        self.sequences.add(sequence)
        return sequence


class GrammarLanes:
    """The lanes of each grammar, by the tokenizer's key and the grammar's text. Not safe for several threads.

    `most`: lanes of one grammar.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers = itertools.count()
        self._lanes: OrderedDict[tuple[bytes, str], list[Lane]] = OrderedDict()

    def find(self, key: bytes, text: str) -> Lane | None:
        """Return the lane that a new sequence joins, or None if it needs one that is not built yet."""
        lanes = self._lanes.get((key, text))
        if not lanes:
            return None
        self._lanes.move_to_end((key, text))
        least = min(lanes, key=lambda lane: len(lane.sequences))
        return least if len(least.sequences) < SEQUENCES_EACH or len(lanes) >= self._most else None

    def add(self, key: bytes, text: str, matcher: "LLMatcher") -> Lane:
        """Add a lane. The grammars that were used least recently are dropped if too many lanes are kept."""
        lane = Lane(next(self._numbers), matcher)
        self._lanes.setdefault((key, text), []).append(lane)
        self._lanes.move_to_end((key, text))
        while len(self._lanes) > 1 and sum(map(len, self._lanes.values())) > _KEPT_LANES:
            self._lanes.popitem(last=False)
        return lane

    def retain(self, keys: Collection[bytes]) -> None:
        """Drop the lanes of all other tokenizers."""
        for grammar in [grammar for grammar in self._lanes if grammar[0] not in keys]:
            del self._lanes[grammar]
