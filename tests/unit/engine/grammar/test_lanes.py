"""Which of its lanes a sequence of a grammar joins."""

from pathlib import Path

import pytest
from llguidance import LLMatcher

from runtime.engine.grammar.guided_sequence import GuidedSequence
from runtime.engine.grammar.lanes import SEQUENCES_EACH, GrammarLanes
from runtime.engine.grammar.tokenizer import GrammarTokenizer, read_tokenizer
from runtime.types import Grammar
from tests.support import tokenizers as tiny

TEXT = LLMatcher.grammar_from_lark('start: "a" | "b"')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    folder = tiny.byte_level(tmp_path_factory.mktemp("tokenizer"))
    return read_tokenizer(Path(folder, "tokenizer.json").read_text(encoding="utf-8"), 396, (0,))


def opened(lanes: GrammarLanes, tokenizer: GrammarTokenizer, count: int, text: str = TEXT) -> list[GuidedSequence]:
    """Open sequences of a grammar, and build a lane whenever one is needed."""
    sequences = []
    for _ in range(count):
        lane = lanes.find(b"key", text)
        if lane is None:
            lane = lanes.add(b"key", text, LLMatcher(tokenizer.library, text, log_level=0))
        sequences.append(lane.open(tokenizer, Grammar(text)))
    return sequences


def test_few_sequences_share_a_lane(tokenizer: GrammarTokenizer) -> None:
    sequences = opened(GrammarLanes(8), tokenizer, SEQUENCES_EACH)
    assert len({sequence.lane for sequence in sequences}) == 1


def test_many_sequences_spread_evenly_over_the_most_lanes(tokenizer: GrammarTokenizer) -> None:
    sequences = opened(GrammarLanes(3), tokenizer, 10 * SEQUENCES_EACH + 2)
    counts = [sum(s.lane == lane for s in sequences) for lane in {s.lane for s in sequences}]
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 1


def test_sequences_that_have_ended_leave_room_in_their_lane(tokenizer: GrammarTokenizer) -> None:
    lanes = GrammarLanes(8)
    first = opened(lanes, tokenizer, SEQUENCES_EACH)
    second = opened(lanes, tokenizer, 1)
    assert second[0].lane != first[0].lane
    lane = first[0].lane
    first.clear()
    assert opened(lanes, tokenizer, 1)[0].lane == lane


def test_grammars_do_not_share_lanes_and_the_oldest_go_first(tokenizer: GrammarTokenizer) -> None:
    lanes = GrammarLanes(1)
    texts = [LLMatcher.grammar_from_lark(f'start: "a{index}"') for index in range(65)]
    numbers = [opened(lanes, tokenizer, 1, text)[0].lane for text in texts]
    assert len(set(numbers)) == 65
    assert lanes.find(b"key", texts[0]) is None
    kept = lanes.find(b"key", texts[1])
    assert kept is not None
    assert kept.number == numbers[1]


def test_lanes_go_with_their_tokenizer(tokenizer: GrammarTokenizer) -> None:
    lanes = GrammarLanes(2)
    opened(lanes, tokenizer, 1)
    lanes.retain({b"another"})
    assert lanes.find(b"key", TEXT) is None
