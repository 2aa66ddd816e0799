"""Ends a sequence's reasoning after a number of tokens, alone or in addition to other masks."""

from collections.abc import Sequence

import numpy as np

from runtime.engine.grammar.interfaces import MaskSource, TokenMasks
from runtime.types import ReasoningBudget

_ALL_ALLOWED = -1


class ReasoningLimit:
    """Implements MaskSource. Once reasoning has used up its budget, only the token that ends it may be drawn.

    `inner`: the request's other mask source; None = it has none.
    """

    def __init__(self, budget: ReasoningBudget, inner: MaskSource | None = None) -> None:
        self._budget = budget
        self._inner = inner
        self._left = budget.tokens
        self._reasoning = budget.starts_in_reasoning
        self._is_first = True

    def fill_mask(self, words: TokenMasks) -> None:
        if self._reasoning and self._left <= 0:
            words[:] = 0
            words.view(np.uint32)[self._budget.close_id // 32] = np.uint32(1 << self._budget.close_id % 32)
        elif self._inner is None:
            words[:] = _ALL_ALLOWED
        else:
            self._inner.fill_mask(words)

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self._reasoning:
                self._left -= 1
                self._reasoning = token != self._budget.close_id
            elif self._is_first and token == self._budget.open_id:
                self._reasoning = True
            self._is_first = False
        if self._inner is not None:
            self._inner.accept(tokens)

    def forced(self) -> Sequence[int]:
        return () if self._reasoning or self._inner is None else self._inner.forced()

    @property
    def finished(self) -> bool:
        return self._inner is not None and self._inner.finished

    @property
    def is_spent(self) -> bool:
        may_open = self._is_first and self._budget.open_id is not None
        return not self._reasoning and not may_open and (self._inner is None or self._inner.is_spent)
