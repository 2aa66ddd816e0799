"""Collects the token ids that end a model's turn, from every file of a checkpoint that names one.

generation_config.json, config.json and the tokenizer each name end tokens, and chat models often name the end of a turn in one of them only.
"""

from pathlib import Path
from typing import TypeVar

import msgspec

from runtime.errors import LoadFailed

Ids = int | list[int] | None
T = TypeVar("T")


class _TokenIds(msgspec.Struct, frozen=True):
    eos_token_id: Ids = None


class _Content(msgspec.Struct, frozen=True):
    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    eos_token: str | _Content | bool | None = None
    added_tokens_decoder: dict[str, _Content] = {}


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str


class _Tokenizer(msgspec.Struct, frozen=True):
    added_tokens: list[_AddedToken] = []


class _Vocabulary(msgspec.Struct, frozen=True):
    vocab: dict[str, int]


class _TokenizerModel(msgspec.Struct, frozen=True):
    model: _Vocabulary


def end_token_ids(model_dir: Path, class_default: Ids, vocab_size: int) -> tuple[int, ...]:
    """Return the union of the ids that the checkpoint's files name, the generation config's first.

    `class_default` (the model class's own) counts only if no file names one. Ids outside the vocabulary are left out: they can never be drawn.
    Raises LoadFailed naming a damaged file.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found += _listed((_read(model_dir / name, _TokenIds) or _TokenIds()).eos_token_id)
    found += _of_tokenizer(model_dir)
    return tuple(token for token in dict.fromkeys(found or _listed(class_default)) if 0 <= token < vocab_size)


def _of_tokenizer(model_dir: Path) -> list[int]:
    config = _read(model_dir / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    text = config.eos_token.content if isinstance(config.eos_token, _Content) else config.eos_token
    if not isinstance(text, str) or not text:
        return []
    for token_id, token in config.added_tokens_decoder.items():
        if token.content == text and token_id.isdigit():
            return [int(token_id)]
    path = model_dir / "tokenizer.json"
    added = _read(path, _Tokenizer) or _Tokenizer()
    if (found := next((one.id for one in added.added_tokens if one.content == text), None)) is not None:
        return [found]
    try:
        vocabulary = _read(path, _TokenizerModel)
    except LoadFailed:  # a unigram vocabulary is a list; its end token is an added one
        return []
    return [vocabulary.model.vocab[text]] if vocabulary is not None and text in vocabulary.model.vocab else []


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, OSError, UnicodeError) as error:
        raise LoadFailed(f"{path} cannot be read: {error}") from error


def _listed(ids: Ids) -> list[int]:
    return ids if isinstance(ids, list) else [ids] if ids is not None else []
