"""Mask sources over llguidance: texts that random draws make of a grammar, the reasoning before it, and what is kept and refused."""

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from common.model_key import Quantization
from runtime.engine.grammar.guided_sequence import GrammarError
from runtime.engine.grammar.interfaces import MaskSource, mask_words
from runtime.engine.grammar.mask_sources import GrammarMaskSources
from runtime.errors import InvalidRequest
from runtime.types import Checkpoint, Grammar, ModelFacts
from tests.support import tokenizers as tiny
from tests.support.masks import unpack

EOS = 0
COLOURS = Grammar(json.dumps({"grammars": [{"lark_grammar": 'start: "{" ("red" | "blue") "}"'}]}))
DIGITS = Grammar(json.dumps({"grammars": [{"lark_grammar": "start: /[0-9]+/"}]}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.byte_level(tmp_path_factory.mktemp("tokenizer"), additional_special_tokens=["<think>", "</think>"])


def facts(vocab_size: int, eos: tuple[int, ...] = (EOS,)) -> ModelFacts:
    return ModelFacts("m", "", "", "float32", Quantization.NONE, 0, 0, 100, vocab_size, 0, eos)


class Run:
    """Draws pseudo-random tokens from one mask source until it is finished."""

    def __init__(self, folder: Path, source: MaskSource, vocab_size: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.source = source
        self.vocab_size = vocab_size
        self.tokens: list[int] = []

    def mask(self) -> list[int]:
        words = np.zeros(mask_words(self.vocab_size), np.int32)
        self.source.fill_mask(words)
        return unpack(words, self.vocab_size)

    def take(self, *tokens: int) -> None:
        self.source.accept(tokens)
        self.tokens += tokens

    def finish(self, rng: random.Random, most: int = 40) -> str:
        while not self.source.finished and len(self.tokens) < most:
            allowed = self.mask()
            token = rng.choice(allowed)
            if token == EOS:
                break
            self.take(token)
            self.take(*self.source.forced())
        return str(self.tokenizer.decode(self.tokens))


def open_run(
    folder: Path, grammar: Grammar, sources: GrammarMaskSources, *, vocab_size: int = 396, eos: tuple[int, ...] = (EOS,)
) -> Run:
    source = sources.open(Checkpoint(str(folder)), facts(vocab_size, eos), grammar).result()
    return Run(folder, source, vocab_size)


@pytest.mark.parametrize("vocab_size", [390, 396, 500])
@pytest.mark.parametrize("eos", [(EOS,), (EOS, 2), ()])
def test_mask_source_draws_texts_of_the_grammar(folder: Path, vocab_size: int, eos: tuple[int, ...]) -> None:
    sources = GrammarMaskSources()
    texts = {
        open_run(folder, COLOURS, sources, vocab_size=vocab_size, eos=eos).finish(random.Random(seed))
        for seed in range(20)
    }
    assert texts == {"{red}", "{blue}"}


def test_mask_source_finishes_a_sequence_when_nothing_may_follow(folder: Path) -> None:
    sources = GrammarMaskSources()
    colours, digits = open_run(folder, COLOURS, sources), open_run(folder, DIGITS, sources)
    colours.finish(random.Random(1))
    digits.take(*digits.tokenizer.encode("42").ids)
    assert colours.source.finished
    assert not digits.source.finished
    assert EOS in digits.mask()
    digits.take(EOS)
    assert digits.source.finished


def test_mask_source_forces_the_only_continuation(folder: Path) -> None:
    run = open_run(folder, COLOURS, GrammarMaskSources())
    run.take(*run.tokenizer.encode("{r").ids)
    assert run.tokenizer.decode(run.source.forced()) == "ed}"


def test_copies_of_one_grammar_do_not_share_their_state(folder: Path) -> None:
    sources = GrammarMaskSources()
    first, second = open_run(folder, COLOURS, sources), open_run(folder, COLOURS, sources)
    before = second.mask()
    first.finish(random.Random(2))
    assert second.mask() == before
    assert open_run(folder, COLOURS, sources).mask() == before


def marked(folder: Path) -> tuple[Path, dict[str, int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<think>", "</think>"])
    path = folder.parent / f"{folder.name}-marked"
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path, {name: tokenizer.token_to_id(name) or 0 for name in ("<think>", "</think>")}


def test_reasoning_that_the_prompt_opened_is_free_up_to_its_end(folder: Path) -> None:
    path, ids = marked(folder)
    grammar = msgspec.structs.replace(COLOURS, reasoning_close="</think>", starts_in_reasoning=True)
    run = open_run(path, grammar, GrammarMaskSources(), vocab_size=398)
    for token in (9, 300, EOS, 17):
        assert run.mask() == list(range(398))
        assert not run.source.forced()
        run.take(token)
    run.take(ids["</think>"])
    assert [run.tokenizer.decode([token]) for token in run.mask()] == ["{"]
    run.tokens.clear()
    assert run.finish(random.Random(3)) in ("{red}", "{blue}")


def test_reasoning_may_end_in_pieces_and_inside_a_token(folder: Path) -> None:
    grammar = msgspec.structs.replace(DIGITS, reasoning_close="zo", starts_in_reasoning=True)
    run = open_run(folder, grammar, GrammarMaskSources())
    run.take(*run.tokenizer.encode("a lazoz").ids[:-1])
    assert "3" in run.tokenizer.decode(run.mask())
    assert len(run.mask()) == 10


def test_mask_source_lets_the_first_token_open_the_reasoning(folder: Path) -> None:
    path, ids = marked(folder)
    grammar = msgspec.structs.replace(COLOURS, reasoning_close="</think>", reasoning_open_id=ids["<think>"])
    sources = GrammarMaskSources()
    thinking, direct = (open_run(path, grammar, sources, vocab_size=398) for _ in range(2))
    assert ids["<think>"] in thinking.mask()
    thinking.take(ids["<think>"], 9, ids["</think>"])
    assert [thinking.tokenizer.decode([token]) for token in thinking.mask()] == ["{"]
    direct.take(*direct.tokenizer.encode("{").ids)
    assert ids["<think>"] not in direct.mask()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"lark_grammar": "start: <|nothing|>"}, "unknown special token"),
        ({"lark_grammar": "start: x"}, "unknown name"),
        ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text matches it"),
    ],
)
def test_mask_source_refuses_a_grammar_that_does_not_suit_the_tokenizer(
    folder: Path, body: dict[str, object], error: str
) -> None:
    with pytest.raises(InvalidRequest, match=error) as caught:
        open_run(folder, Grammar(json.dumps({"grammars": [body]})), GrammarMaskSources())
    assert "\n" not in caught.value.detail


def test_mask_source_fails_at_the_mask_after_a_forbidden_token(folder: Path) -> None:
    run = open_run(folder, COLOURS, GrammarMaskSources())
    run.take(*run.tokenizer.encode("zz").ids)
    assert not run.source.forced()
    assert not run.source.finished
    with pytest.raises(GrammarError, match=r"doesn.t satisfy the grammar"):
        run.mask()


def test_mask_source_that_exceeds_the_librarys_limits_fails_instead_of_ending_the_text(folder: Path) -> None:
    nested = Grammar(json.dumps({"grammars": [{"lark_grammar": "start: /(a{1000}){1000}/"}]}))
    run = open_run(folder, nested, GrammarMaskSources())
    with pytest.raises(GrammarError, match="too many expressions"):
        run.finish(random.Random(3), most=4000)
    assert not run.source.finished


def test_mask_source_refuses_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no readable tokenizer\.json"):
        open_run(tmp_path, COLOURS, GrammarMaskSources())


def test_mask_source_refuses_a_tokenizer_without_bytes(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be used with a grammar"):
        open_run(tiny.word_pieces(tmp_path), COLOURS, GrammarMaskSources(), vocab_size=9)


def test_mask_source_counts_what_it_builds(folder: Path) -> None:
    sources = GrammarMaskSources()
    for grammar in (COLOURS, DIGITS, COLOURS):
        open_run(folder, grammar, sources)
    found = sources.figures
    assert (found.tokenizers_total, found.grammars_total, found.known_grammars_total) == (1, 2, 1)
    assert found.grammar_seconds_total > 0
    assert found.tokenizer_seconds_total > 0


def test_equal_tokenizers_are_kept_once_and_while_a_model_has_them(folder: Path, tmp_path: Path) -> None:
    twin, other = tiny.byte_level(tmp_path / "twin"), tiny.sentencepiece(tmp_path / "other")
    sources = GrammarMaskSources()
    assert sources.host_bytes == 0
    open_run(folder, COLOURS, sources)
    one = sources.host_bytes
    assert one > 0
    open_run(twin, COLOURS, sources)
    assert sources.host_bytes == one
    open_run(other, DIGITS, sources, vocab_size=400)
    assert sources.host_bytes > one
    sources.retain({str(twin)})
    assert sources.host_bytes == one
    sources.retain(set())
    assert sources.host_bytes == 0


def masks_together(sources: GrammarMaskSources, runs: list[Run]) -> list[list[int]]:
    """The next masks of several runs, computed at once. A line without a source stays as it is."""
    words = np.zeros((len(runs) + 1, mask_words(runs[0].vocab_size)), np.int32)
    sources.compute([None, *(run.source for run in runs)], words)
    assert not words[0].any()
    for run, line in zip(runs, words[1:], strict=True):
        run.source.fill_mask(line)
    return [unpack(line, run.vocab_size) for run, line in zip(runs, words[1:], strict=True)]


@pytest.mark.parametrize("fill_threads", [1, 2])
@pytest.mark.parametrize("vocab_size", [380, 390, 396, 500])
def test_mask_sources_compute_together_equals_alone(folder: Path, vocab_size: int, fill_threads: int) -> None:
    sources = GrammarMaskSources(fill_threads=fill_threads)
    rng = random.Random(4)
    thinking = msgspec.structs.replace(DIGITS, reasoning_close="zo", starts_in_reasoning=True)
    grammars = [COLOURS, DIGITS, thinking, COLOURS, DIGITS, DIGITS] * 3
    alone = [open_run(folder, grammar, sources, vocab_size=vocab_size) for grammar in grammars]
    together = [open_run(folder, grammar, sources, vocab_size=vocab_size) for grammar in grammars]
    for _ in range(4):
        masks = masks_together(sources, together)
        assert masks == [run.mask() for run in alone]
        for mask, one, other in zip(masks, alone, together, strict=True):
            token = rng.choice(mask)
            one.take(token)
            other.take(token)


def test_guided_sequence_accept_drops_computed_mask(folder: Path) -> None:
    sources = GrammarMaskSources(fill_threads=2)
    runs = [open_run(folder, COLOURS, sources) for _ in range(4)]
    sources.compute([run.source for run in runs], np.zeros((4, mask_words(396)), np.int32))
    runs[0].take(*runs[0].tokenizer.encode("{").ids)
    assert {runs[0].tokenizer.decode([token])[0] for token in runs[0].mask()} == {"r", "b"}
