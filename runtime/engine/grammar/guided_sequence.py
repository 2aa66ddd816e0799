"""Masks of one sequence that follows a grammar, with a gate that leaves the model's reasoning free."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.engine.grammar.interfaces import TokenMasks
from runtime.engine.grammar.tokenizer import GrammarTokenizer
from runtime.errors import InvalidRequest
from runtime.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

_ALL_ALLOWED = -1
_NO_TEXT = "NoExtensionBias"  # the library's code for a grammar that no text matches


class GrammarError(InvalidRequest):
    """The grammar cannot continue, because it exceeds a limit on the work for one token."""


class GuidedSequence:
    """Implements MaskSource.

    The matcher begins after the reasoning. If the prompt has not opened the reasoning, the first token may be the one that opens it.
    """

    def __init__(self, matcher: "LLMatcher", tokenizer: GrammarTokenizer, grammar: Grammar, lane: int) -> None:
        """`lane`: sequences with the same number cannot compute their masks at once."""
        self._matcher = matcher
        self._tokenizer = tokenizer
        self.lane = lane
        self._close = grammar.reasoning_close.encode()
        self._open_id = grammar.reasoning_open_id
        self._reasoning = bool(grammar.reasoning_close) and grammar.starts_in_reasoning
        self._tail = b""
        self._is_first = True
        self._is_computed = False  # the line that comes next has the matcher's mask

    @property
    def awaits_mask(self) -> bool:
        """Whether the next mask is the matcher's, and is not computed yet."""
        return not self._is_computed and not self._reasoning and not self._matcher.is_error()

    @property
    def matcher(self) -> "LLMatcher":
        return self._matcher

    @property
    def tokenizer(self) -> GrammarTokenizer:
        return self._tokenizer

    def note_computed(self) -> None:
        """Note that the matcher has written its mask to the line that `fill_mask` gets next."""
        self._is_computed = True

    @property
    def finished(self) -> bool:
        # A matcher also stops at an error, which the next mask reports.
        return not self._reasoning and self._matcher.is_stopped() and not self._matcher.is_error()

    is_spent = False

    def fill_mask(self, words: TokenMasks) -> None:
        if self._reasoning:
            words[:] = _ALL_ALLOWED
            return
        if self._is_computed:
            self._is_computed = False
            self._tokenizer.cut(words)
        else:
            self._tokenizer.fill(self._matcher, words)
        self._check()
        if self._is_first and self._open_id is not None:
            word, bit = divmod(self._open_id, 32)
            words[word] |= -(1 << 31) if bit == 31 else 1 << bit

    def accept(self, tokens: Sequence[int]) -> None:
        self._is_computed = False
        for token in tokens:
            if self._is_first and token == self._open_id:
                self._reasoning = True
            elif self._reasoning:
                self._follow_reasoning(token)
            else:
                self._matcher.consume_token(token)
            self._is_first = False

    def forced(self) -> list[int]:
        if self._reasoning or (self._is_first and self._open_id is not None) or self._matcher.is_error():
            return []
        return self._matcher.compute_ff_tokens()

    def _follow_reasoning(self, token: int) -> None:
        """Look for the text that ends the reasoning. The rest of its token belongs to the grammar's text, except white space."""
        data = self._tail + self._tokenizer.library.decode_bytes([token])
        _, found, rest = data.partition(self._close)
        if not found:
            self._tail = data[-len(self._close) :]
            return
        self._reasoning = False
        if rest := rest.lstrip():
            self._matcher.consume_tokens(self._tokenizer.library.tokenize_bytes(rest))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(first_line(self._matcher.get_error()))


def first_line(error: str) -> str:
    """Return the first line of the library's message. The others are the parser's state."""
    line = error.partition("\n")[0]
    return "no text matches it" if line == _NO_TEXT else line
