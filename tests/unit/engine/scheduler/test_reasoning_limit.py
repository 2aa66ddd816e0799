"""Reasoning that has used up its budget goes on with the token that ends it, with and without a grammar."""

import numpy as np
import pytest

from runtime.engine.grammar.interfaces import MaskSource, mask_words
from runtime.engine.scheduler.reasoning_limit import ReasoningLimit
from runtime.types import ReasoningBudget
from tests.support.masks import GrammarMasks, unpack

VOCAB, OPEN, CLOSE = 70, 31, 63


def allowed(source: MaskSource) -> list[int]:
    words = np.zeros(mask_words(VOCAB), np.int32)
    source.fill_mask(words)
    return unpack(words, VOCAB)


def is_spent(source: MaskSource) -> bool:
    return source.is_spent


def test_reasoning_that_the_prompt_opened_ends_at_its_budget() -> None:
    source = ReasoningLimit(ReasoningBudget(3, CLOSE, starts_in_reasoning=True))
    for token in (1, 2, 3):
        assert allowed(source) == list(range(VOCAB))
        source.accept((token,))
    assert allowed(source) == [CLOSE]
    assert not is_spent(source)
    source.accept((CLOSE,))
    assert is_spent(source)
    assert allowed(source) == list(range(VOCAB))
    assert not source.finished


def test_reasoning_may_be_opened_by_the_first_token_only() -> None:
    source = ReasoningLimit(ReasoningBudget(0, CLOSE, OPEN))
    assert allowed(source) == list(range(VOCAB))
    source.accept((OPEN,))
    assert allowed(source) == [CLOSE]
    later = ReasoningLimit(ReasoningBudget(0, CLOSE, OPEN))
    assert not is_spent(later)
    later.accept((1, OPEN))
    assert is_spent(later)
    assert allowed(later) == list(range(VOCAB))


def test_reasoning_that_ends_in_time_is_left_alone() -> None:
    source = ReasoningLimit(ReasoningBudget(2, CLOSE, starts_in_reasoning=True))
    source.accept((1, CLOSE, 5, 6, 7))
    assert allowed(source) == list(range(VOCAB))


@pytest.mark.parametrize("grammar", ["half", "often"])
def test_reasoning_limit_leaves_the_grammar_what_follows(grammar: str) -> None:
    inner, alone = (GrammarMasks(grammar, VOCAB, lambda: None) for _ in range(2))
    source = ReasoningLimit(ReasoningBudget(0, CLOSE, OPEN), inner)
    first = allowed(alone)[0]
    for one in (source, alone):
        one.accept((first,))
    assert allowed(source) == allowed(alone)
    assert list(source.forced()) == alone.forced()
    assert not is_spent(source)
