"""Checkpoints that have only a sentencepiece model: converted once, and the same tokens as transformers and sentencepiece give."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from common.model_key import ModelSettings, Quantization
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.pack.aux_files import convert_tokenizer
from runtime.puller.preparer import CheckpointPreparer
from runtime.text.tokenizer import TextTokenizer, open_tokenizer
from runtime.text.tokenizer_files import read_tokenizer_config
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.packing import pack_here
from tests.support.sources import OPEN

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps under some tree while rain falls on the roof"
SAME = ("Hello world", "two  spaces ", "Würde, 你好 😀", "def f(x):\n\n    return x\t", "")
DIFFERENT = (
    "  two  spaces",
    " a",
    "<s>not a token</s>",
    "fox" * 50,
)  # where transformers differs from sentencepiece, it is right


def with_sentencepiece(folder: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    """As Llama's own: no normalising, bytes for what it does not know."""
    tiny_llama(folder)
    (folder / "tokenizer.json").unlink()
    chance = random.Random(1)
    lines = [" ".join(chance.choices(WORDS.split(), k=12)) for _ in range(300)]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def check(ours: TextTokenizer, oracle: sentencepiece.SentencePieceProcessor) -> None:
    for text in SAME:
        ids = oracle.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids).removeprefix(" ") == oracle.decode(ids).removeprefix(" "), text
    # piece by piece, as tokens come
    ids = oracle.encode(SAME[2])
    stream = ours.detokenizer(())
    assert "".join(stream.push([token]) for token in ids) + stream.flush() == SAME[2]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_convert_tokenizer_matches_sentencepiece(kind: str, tmp_path: Path) -> None:
    oracle = with_sentencepiece(tmp_path / "m", kind)
    (tmp_path / "out").mkdir()
    convert_tokenizer(tmp_path / "m", tmp_path / "out")
    ours = open_tokenizer(tmp_path / "out", read_tokenizer_config(tmp_path / "out"))
    check(ours, oracle)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (*SAME, *DIFFERENT):
        assert ours.encode(text) == theirs.encode(text), text


async def test_preparer_converts_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    oracle = with_sentencepiece(tmp_path / "m", "bpe")
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30), pack_here)
    for quantize in (Quantization.NONE, Quantization.NF4):
        settings = ModelSettings(quantize=quantize)
        prepared = await preparation.prepare(
            ModelSource(str(tmp_path / "m"), None, {}), settings, "cpu", lambda progress: None
        )
        folder = Path(prepared.checkpoint.model_dir)
        assert folder != tmp_path / "m"
        check(open_tokenizer(folder, read_tokenizer_config(folder)), oracle)
        prepared.release()
    preparation.close()


def test_convert_tokenizer_refuses_a_damaged_model(tmp_path: Path) -> None:
    with_sentencepiece(tmp_path / "m", "bpe")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"\x00 nothing of the kind")
    (tmp_path / "out").mkdir()
    with pytest.raises(LoadFailed, match=r"the tokenizer cannot be converted to tokenizer\.json"):
        convert_tokenizer(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
