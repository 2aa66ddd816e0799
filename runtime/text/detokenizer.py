"""Turns token ids into text as they come, without splitting a character. There is one detokenizer per sequence.

The texts that `push` and `flush` return, joined, are the decoding of all tokens. An incomplete character is held until it is complete or
cannot become so. If the byte tokens of a sentencepiece-like tokenizer do not form valid UTF-8, each maximal invalid part becomes one U+FFFD.
A decoder of the whole text writes one U+FFFD per byte of the run instead, but a stream has already sent the run's beginning.
docs/decisions/0001-detokenizer.md says why `tokenizers.DecodeStream` is not used.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from runtime.errors import EngineFault
from runtime.text.panics import panics_as
from runtime.text.token_bytes import START_KEEP, START_STRIP_ONE, TokenBytes

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete, which may be empty."""

    def flush(self) -> str:
        """End the text. Return U+FFFD for an incomplete character that was held."""


class ByteDetokenizer:
    """For tokenizers in which each token stands for its own bytes."""

    __slots__ = ("_decode", "_pieces", "_start")

    def __init__(self, pieces: TokenBytes, at_start: str = START_KEEP) -> None:
        """`at_start` is the rule for the text's first token: START_KEEP after a prompt with text."""
        self._pieces = pieces
        self._decode = _UTF8("replace").decode
        self._start = at_start

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if len(token_ids) == 1:
            data = pieces[token_ids[0]]
        else:
            data = b"".join([pieces[token_id] for token_id in token_ids])
        if self._start is not START_KEEP and data:
            data = self._strip_start(token_ids)
        return self._decode(data)

    def flush(self) -> str:
        return self._decode(b"", True)

    def _strip_start(self, token_ids: Sequence[int]) -> bytes:
        parts = [self._pieces[token_id] for token_id in token_ids]
        first = next(index for index, part in enumerate(parts) if part)
        if self._start is START_STRIP_ONE:
            parts[first] = parts[first].removeprefix(b" ")
        else:
            parts[first] = self._pieces.without_marks(token_ids[first])
        self._start = START_KEEP
        return b"".join(parts)


class WindowDetokenizer:
    """For other tokenizers: decodes a short window again with each token and returns what is new."""

    __slots__ = ("_ids", "_read", "_shown", "_skipped", "_tokenizer")

    CONTEXT_TOKENS = 6  # of the prompt, so that the first tokens' spacing is right

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids = list(prompt[-self.CONTEXT_TOKENS :])
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        text = self._decode(self._ids)
        return text[len(self._shown) :]

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if len(text) <= len(self._shown) or text.endswith("�"):
            return ""
        new = text[len(self._shown) :]
        # The tokens of this piece become the context of the next one.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        kept = [token_id for token_id in token_ids if token_id not in self._skipped]
        with panics_as(EngineFault, "its tokenizer cannot decode what the model wrote"):
            return str(self._tokenizer.decode(kept, skip_special_tokens=False))
