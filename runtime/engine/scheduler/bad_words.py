"""Masks the token sequences that a request bans, alone or in addition to a grammar."""

from collections.abc import Iterable, Sequence

import numpy as np

from runtime.engine.grammar.interfaces import MaskSource, TokenMasks

_ALL_ALLOWED = -1


class BadWords:
    """Implements MaskSource. A banned sequence counts in the output only, not in the prompt. `grammar`: the source of the request's grammar."""

    def __init__(self, words: Iterable[Sequence[int]], grammar: MaskSource | None = None) -> None:
        self._words = [(tuple(word[:-1]), word[-1]) for word in words]
        self._longest = max((len(head) for head, _ in self._words), default=0)
        self._grammar = grammar
        self._tail: tuple[int, ...] = ()  # the last tokens of the output, as many as a word can need

    def fill_mask(self, words: TokenMasks) -> None:
        """Raises ValueError if no token is left."""
        if self._grammar is None:
            words[:] = _ALL_ALLOWED
        else:
            self._grammar.fill_mask(words)
        was_empty = not words.any()
        bits = words.view(np.uint32)
        for token in self._banned(self._tail):
            bits[token // 32] &= ~np.uint32(1 << token % 32)
        if not was_empty and not words.any():
            raise ValueError("bad_words exclude every token that the grammar allows")

    def accept(self, tokens: Sequence[int]) -> None:
        if self._grammar is not None:
            self._grammar.accept(tokens)
        self._tail = self._after(self._tail, tokens)

    def forced(self) -> list[int]:
        forced = list(self._grammar.forced()) if self._grammar is not None else []
        tail = self._tail
        for index, token in enumerate(forced):
            if token in self._banned(tail):
                return forced[:index]
            tail = self._after(tail, (token,))
        return forced

    @property
    def finished(self) -> bool:
        return self._grammar is not None and self._grammar.finished

    is_spent = False

    def _banned(self, tail: tuple[int, ...]) -> set[int]:
        return {last for head, last in self._words if not head or tail[-len(head) :] == head}

    def _after(self, tail: tuple[int, ...], tokens: Sequence[int]) -> tuple[int, ...]:
        return (*tail, *tokens)[-self._longest :] if self._longest else ()
