"""Detokenizing against the `tokenizers` library and transformers: nothing lost, no character split."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from common.model_key import ModelSettings
from runtime.text.text_model import TextModel, load_text
from tests.support import tokenizers as tiny

FAMILIES = ("byte_level", "sentencepiece", "gemma_like", "metaspace", "word_pieces")
_MAKERS = {
    "byte_level": tiny.byte_level,
    "sentencepiece": tiny.sentencepiece,
    "gemma_like": lambda path: tiny.sentencepiece(path, strip=False),
    "metaspace": tiny.metaspace,
    "word_pieces": tiny.word_pieces,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextModel, Any]]:
    from transformers import PreTrainedTokenizerFast

    made: dict[str, tuple[TextModel, Any]] = {}
    for family in FAMILIES:
        path: Path = _MAKERS[family](tmp_path_factory.mktemp(family))
        made[family] = (load_text(path, ModelSettings()), PreTrainedTokenizerFast.from_pretrained(str(path)))
    return made


TEXTS = ["The dog sleeps.", " the dog", "Grüße 🤖🙂 東京", "a  b\n\n c", "", "naïve café — END", "👩‍👩‍👧 e\u0301"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_encodes_and_decodes_like_transformers(
    models: dict[str, tuple[TextModel, Any]], family: str, text: str
) -> None:
    ours, theirs = models[family]
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == wanted


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", ["byte_level", "metaspace", "word_pieces"])
def test_detokenizer_deltas_join_to_the_full_decoding(
    models: dict[str, tuple[TextModel, Any]], family: str, data: st.DataObject
) -> None:
    ours, theirs = models[family]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    stream = ours.detokenizer((), skip_special_tokens=skip)
    deltas: list[str] = []
    at = 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        deltas.append(stream.push(ids[at : at + size]))
        at += size
    assert "".join(deltas) + stream.flush() == theirs.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", ["sentencepiece", "gemma_like"])
def test_detokenizer_invalid_bytes_are_independent_of_boundaries(
    models: dict[str, tuple[TextModel, Any]], family: str, data: st.DataObject
) -> None:
    ours, _ = models[family]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(3, 258), max_size=30))
    stream = ours.detokenizer(())
    single = "".join([stream.push((token,)) for token in ids]) + stream.flush()
    assert single == ours.decode(ids)
    text = b"".join(ours.token_bytes(token) for token in ids if not ours.is_special(token)).decode(errors="replace")
    assert single in (text, text.removeprefix(" "))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20), prompt=st.sampled_from(["", "the dog", "the "]))
@pytest.mark.parametrize("family", ["sentencepiece", "gemma_like"])
def test_detokenizer_returns_byte_fallback_text(
    models: dict[str, tuple[TextModel, Any]], family: str, text: str, prompt: str
) -> None:
    ours, _ = models[family]
    before = ours.encode(prompt)
    ids = ours.encode(text, add_special_tokens=False)
    stream = ours.detokenizer(before if prompt else ())
    deltas = [stream.push((token,)) for token in ids]
    whole = "".join(deltas) + stream.flush()
    assert whole == ours.decode([*before, *ids] if prompt else ids)[len(ours.decode(before)) if prompt else 0 :]
    if "�" not in text:
        assert all("�" not in delta for delta in deltas)


def test_detokenizer_holds_a_character_until_it_is_complete(models: dict[str, tuple[TextModel, Any]]) -> None:
    ours, _ = models["sentencepiece"]
    ids = [ours.encode("x")[0] * 0 + 3 + byte for byte in "🤖".encode()]  # byte tokens follow the three special ones
    stream = ours.detokenizer(ours.encode("the"))
    assert [stream.push((token,)) for token in ids] == ["", "", "", "🤖"]
    assert stream.push(ids[:2]) == ""
    assert stream.flush() == "�"


def test_detokenizer_keeps_a_leading_space_only_after_a_prompt(
    models: dict[str, tuple[TextModel, Any]],
) -> None:
    ours, _ = models["sentencepiece"]
    dog = ours.encode("dog", add_special_tokens=False)
    assert ours.detokenizer(()).push(dog) == "dog"
    assert ours.detokenizer(ours.encode("")).push(dog) == "dog", "a prompt of special tokens alone has no text"
    assert ours.detokenizer(ours.encode("the")).push(dog) == " dog"


def test_detokenizer_ignores_ids_outside_of_the_vocabulary(models: dict[str, tuple[TextModel, Any]]) -> None:
    for ours, _ in models.values():
        assert ours.decode([ours.vocab_size + 5]) == ""
        assert ours.piece(ours.vocab_size + 5) == ""


def test_encode_with_offsets_counts_characters(models: dict[str, tuple[TextModel, Any]]) -> None:
    ours, _ = models["byte_level"]
    text = "Köln dog"
    found = ours.encode_with_offsets(text)
    assert found.offsets[-1][1] == len(text)
    assert len(found.ids) == len(found.pieces) == len(found.offsets)


@pytest.mark.parametrize("content", ["ñandú", "<tool call>", "Ġ", "«a b» "])
@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
def test_detokenizer_returns_the_text_of_an_added_token(tmp_path: Path, family: str, content: str) -> None:
    path = _MAKERS[family](tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(content, normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    model = load_text(path, ModelSettings())
    token_id = tokenizer.token_to_id(content)
    assert token_id is not None
    assert model.decode([token_id]) == content
    assert model.token_bytes(token_id) == content.encode()
    assert model.encode(f"{content}dog{content}").count(token_id) == 2


def test_detokenizer_round_trips_added_tokens_of_byte_level_bpe(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("ñandú", "un ñandú")])
    tokenizer.save(str(path / "tokenizer.json"))
    model = load_text(path, ModelSettings())
    text = "ñandú dog un ñandú, ñandú"
    assert model.decode(model.encode(text)) == text
