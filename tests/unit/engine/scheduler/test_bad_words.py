"""Banned token sequences: which tokens a mask leaves, alone and on top of a grammar."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.grammar.interfaces import mask_words
from runtime.engine.scheduler.bad_words import BadWords
from tests.support.masks import GrammarMasks, allowed_tokens, unpack

VOCAB = 40
_tokens = st.lists(st.integers(0, 5), max_size=12)


def left(source: BadWords) -> set[int]:
    words = np.zeros(mask_words(VOCAB), np.int32)
    source.fill_mask(words)
    return set(unpack(words, VOCAB))


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5), _tokens)
def test_bad_words_ban_the_last_token_of_each_sequence(words: list[list[int]], output: list[int]) -> None:
    source = BadWords(words)
    for token in output:
        source.accept((token,))
    wanted = {
        token
        for token in range(VOCAB)
        if not any((*output, token)[-len(word) :] == tuple(word) for word in words if len(word) <= len(output) + 1)
    }
    assert left(source) == wanted


def test_bad_words_narrow_a_grammar() -> None:
    source = BadWords([[3]], GrammarMasks("half", VOCAB))
    assert left(source) == set(allowed_tokens("half", [], VOCAB)) - {3}


def test_bad_words_that_leave_nothing_of_a_grammar_are_an_error() -> None:
    source = BadWords([[0]], GrammarMasks("half/0", VOCAB))
    with pytest.raises(ValueError, match="bad_words exclude every token"):
        left(source)


def test_bad_words_cut_forced_tokens() -> None:
    def forced(*words: tuple[int, ...]) -> list[int]:
        grammar = GrammarMasks("often", VOCAB)
        for token in range(40):  # an output after which several tokens are forced
            if len(grammar.forced()) > 1:
                break
            grammar.accepted.append(token)
        return list(BadWords(words, grammar).forced()) if words else grammar.forced()

    whole = forced()
    assert len(whole) > 1
    assert forced((whole[0],)) == []
    assert forced((whole[0], whole[1])) == whole[:1]
