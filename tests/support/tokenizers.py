"""Tiny tokenizers made on the spot: byte-level BPE, sentencepiece-like, and one whose decoder depends on neighbours."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "A very long story: the first time I saw the movie, I was a little bit confused.",
    "Grüße aus Köln — naïve café, 東京 and 🤖 robots 🙂 say hello. STOP here, END.",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level(path: Path, **config: Any) -> Path:
    """GPT-2's kind, with ChatML's special tokens. `<|end|>` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return _save(path, tokenizer, {"eos_token": "<|end|>", "chat_template": CHATML, **config})


def sentencepiece(path: Path, *, strip: bool = True, **config: Any) -> Path:
    """Llama's kind: space marks, bytes for what the vocabulary lacks, BOS in front."""
    alphabet = sorted({letter for letter in "".join(CORPUS) if letter.isascii() and letter != " "} | {"▁", "ü"})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("l", "o"), ("▁", "d"), ("o", "g"), ("▁d", "og")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _save(path, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config})


def metaspace(path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return _save(path, tokenizer, {"eos_token": "</s>"})


def word_pieces(path: Path) -> Path:
    """A decoder that joins words with spaces: what a token adds depends on the tokens around it."""
    words = ["[UNK]", "the", "dog", "##s", "sleep", "##ing", ".", "a", "fox"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _save(path, tokenizer, {})


def _save(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path
