"""Converts text to token ids and back with the checkpoint's tokenizer.json. Safe to use from several threads.

Only tokenizer.json's post-processor decides what goes before and after a text (BOS, EOS). As in transformers 5, `add_bos_token` and
`add_eos_token` of tokenizer_config.json change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from runtime.errors import InvalidRequest, LoadFailed
from runtime.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from runtime.text.panics import panics_as
from runtime.text.token_bytes import START_KEEP, Decoding, TokenBytes, byte_level_alphabet, decoding_of
from runtime.text.tokenizer_files import TokenizerConfig, TokenSpec

# Characters for bytes that no text has, or no typed text: some vocabularies leave them out.
_RARE_BYTES = frozenset(
    letter for letter, byte in byte_level_alphabet().items() if byte < 0x20 or byte > 0xEF or byte in (0x7F, 0xC0, 0xC1)
)
_ENCODING = "its tokenizer cannot encode this text"
_MOST_NORMALIZED_AWAY = 4  # a letter with three marks becomes one


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids, their vocabulary pieces, their offsets in the text in characters, and which ones the tokenizer added.

    The offsets of an added special token are (0, 0).
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    added: tuple[bool, ...]

    def last(self, limit: int) -> "Encoding":
        """Return at most `limit` tokens: the added ones, and the last of the text's own."""
        if len(self.ids) <= limit:
            return self
        room = max(0, limit - sum(self.added))
        own = [index for index, added in enumerate(self.added) if not added]
        dropped = set(own[: len(own) - room])
        kept = [index for index in range(len(self.ids)) if index not in dropped][:limit]
        return Encoding(
            tuple(self.ids[i] for i in kept),
            tuple(self.pieces[i] for i in kept),
            tuple(self.offsets[i] for i in kept),
            tuple(self.added[i] for i in kept),
        )


class TextTokenizer:
    """One checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[str] = frozenset()) -> None:
        """`shown`: the special tokens that texts show."""
        self._tokenizer = tokenizer
        added = list(tokenizer.get_added_tokens_decoder().items())
        special = frozenset(i for i, token in added if token.special and token.content not in shown)
        self._special_ids = special
        # llguidance takes these for no text, whether or not they are special: no ordinary text has them.
        self._marker_ids = {
            token.content: i for i, token in added if token.special or token.content[:1] + token.content[-1:] == "<>"
        }
        self._decoding: Decoding | None = decoding_of(tokenizer)
        rule = self._decoding or Decoding(str.encode)
        self._shown = TokenBytes(tokenizer, rule, special)
        self._all = TokenBytes(tokenizer, rule, frozenset())
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self.most_chars_per_token = _most_chars_per_token(tokenizer)

    def showing(self, tokens: frozenset[str]) -> "TextTokenizer":
        """Return a tokenizer whose texts show these special tokens, or this one if it has none of them."""
        known = [self._tokenizer.token_to_id(token) for token in tokens]
        return TextTokenizer(self._tokenizer, tokens) if self._special_ids.intersection(known) else self

    def special_tokens_in(self, text: str) -> frozenset[str]:
        """Return the special tokens whose texts occur in `text`."""
        special = map(self._tokenizer.id_to_token, self._special_ids)
        return frozenset(token for token in special if token and token in text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # Unlike the single call, the batch call releases the GIL, and the fast one leaves out offsets.
        with panics_as(InvalidRequest, _ENCODING):
            [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def encode_with_offsets(self, text: str) -> Encoding:
        """Encode with special tokens."""
        with panics_as(InvalidRequest, _ENCODING):
            [found] = self._tokenizer.encode_batch([text])
        return Encoding(
            tuple(found.ids), tuple(found.tokens), tuple(found.offsets), tuple(map(bool, found.special_tokens_mask))
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        stream = self.detokenizer((), skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.flush()

    def detokenizer(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a detokenizer for the tokens after `prompt`. The first word's leading space is kept unless the prompt has no text."""
        if self._decoding is None:
            return WindowDetokenizer(self._tokenizer, prompt, self._special_ids if skip_special_tokens else frozenset())
        pieces = self._shown if skip_special_tokens else self._all
        at_start = self._decoding.at_start
        if at_start != START_KEEP and any(pieces[token_id] for token_id in prompt):
            at_start = START_KEEP
        return ByteDetokenizer(pieces, at_start)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary's own text of a token, such as `Ġfirst` or `▁Once`, or "" for an unknown id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; for a special token, its name."""
        if self._decoding is None:
            return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()
        return self._all[token_id]

    def marker_id(self, text: str) -> int | None:
        """Return the id of a text that is a token of its own, such as `<think>`, or None."""
        return self._marker_ids.get(text)

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


def open_tokenizer(model_dir: Path, config: TokenizerConfig) -> TextTokenizer:
    """Read tokenizer.json. Raises LoadFailed naming the file."""
    path = model_dir / "tokenizer.json"
    if not path.exists():
        raise LoadFailed(
            f"{model_dir} has no tokenizer.json; a checkpoint with only a slow tokenizer has to be packed first"
        )
    try:
        with panics_as(LoadFailed, f"{path} cannot be read"):
            tokenizer = Tokenizer.from_file(str(path))
    except LoadFailed:
        raise
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise LoadFailed(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_missing_tokens(tokenizer, config)
    return TextTokenizer(tokenizer)


def _most_chars_per_token(tokenizer: Tokenizer) -> int | None:
    """Return how many characters of a text one token can stand for, or None if an unknown-token can stand for any number."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if "<0x41>" not in vocab and not byte_level_alphabet().keys() - _RARE_BYTES <= vocab.keys():
        return None
    return max(map(len, vocab)) * (1 if tokenizer.normalizer is None else _MOST_NORMALIZED_AWAY)


def _add_missing_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Add the tokens that tokenizer_config.json names and tokenizer.json lacks, in the order of their ids."""
    named = set(config.named_tokens().values())
    extra = config.unnamed_tokens()
    specials = named | {spec.content for spec in extra}
    by_id = [spec for _, spec in sorted(config.added_tokens_decoder.items(), key=lambda item: int(item[0]))]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for spec in [*by_id, *(TokenSpec(name) for name in config.named_tokens().values()), *extra]:
        if spec.content in known or not spec.content:
            continue
        known.add(spec.content)
        special = spec.special or spec.content in specials
        token = AddedToken(
            spec.content,
            single_word=spec.single_word,
            lstrip=spec.lstrip,
            rstrip=spec.rstrip,
            normalized=spec.normalized,
            special=special,
        )
        if special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
