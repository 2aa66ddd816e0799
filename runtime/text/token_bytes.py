"""Finds the bytes that each token adds to the text, for decoders where they depend on the token alone.

Byte-level BPE and sentencepiece-like decoders are of this kind, by the `decoder` section of tokenizer.json. For others `decoding_of` returns None
and the detokenizer calls the tokenizer itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from tokenizers import Tokenizer

START_KEEP = "keep"  # the text's first token is not special
START_STRIP_ONE = "strip_one"  # one leading space of the text is dropped
START_STRIP_MARKS = "strip_marks"  # every space mark of the first token is dropped


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a vocabulary piece becomes bytes, and the rule for the start of a text.

    Attributes:
        added_are_text: the content of an added token is plain text, not written in the vocabulary's alphabet.
        without_marks: the bytes of a piece whose space marks are dropped, for START_STRIP_MARKS.
    """

    to_bytes: Callable[[str], bytes]
    at_start: str = START_KEEP
    added_are_text: bool = False
    without_marks: Callable[[str], bytes] = str.encode


class TokenBytes(dict[int, bytes]):
    """Maps token ids to bytes and is filled on first use. Ids outside of the vocabulary and skipped special tokens add nothing."""

    def __init__(self, tokenizer: Tokenizer, decoding: Decoding, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._decoding = decoding
        self._skipped = skipped
        self._texts = (
            {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
            if decoding.added_are_text
            else {}
        )

    def __missing__(self, token_id: int) -> bytes:
        data = self._bytes_of(token_id, self._decoding.to_bytes)
        self[token_id] = data
        return data

    def without_marks(self, token_id: int) -> bytes:
        """Return the bytes of a token whose space marks are dropped. Spaces that are part of the token stay."""
        return self._bytes_of(token_id, self._decoding.without_marks)

    def _bytes_of(self, token_id: int, to_bytes: Callable[[str], bytes]) -> bytes:
        if token_id in self._skipped:
            return b""
        if token_id in self._texts:
            return self._texts[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else to_bytes(piece)


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's characters for bytes: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and following in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def decoding_of(tokenizer: Tokenizer) -> Decoding | None:
    """Return the decoder's rule, or None if a token's bytes depend on its neighbours."""
    decoder = msgspec.json.decode(tokenizer.to_str()).get("decoder")
    if decoder is None:
        return None
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Decoding(_byte_level(), added_are_text=True)
    return _sentencepiece(steps)


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_level_alphabet()

    def to_bytes(piece: str) -> bytes:
        try:
            return bytes([alphabet[letter] for letter in piece])
        except KeyError:  # a piece with a character that stands for no byte is text
            return piece.encode()

    return to_bytes


def _sentencepiece(steps: list[dict[str, Any]]) -> Decoding | None:
    replacements: list[tuple[str, str]] = []
    dropped: list[str] = []
    byte_fallback = False
    at_start = START_KEEP
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": str(text)} if not byte_fallback:
                replacements.append((mark, text))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                at_start = START_STRIP_ONE
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never":
                    at_start = START_STRIP_MARKS
                    dropped.append(mark)
            case _:
                return None

    def to_bytes(piece: str) -> bytes:
        if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        for mark, text in replacements:
            piece = piece.replace(mark, text)
        return piece.encode()

    def without_marks(piece: str) -> bytes:
        for mark in dropped:
            piece = piece.replace(mark, "")
        return to_bytes(piece)

    return Decoding(to_bytes, at_start, without_marks=without_marks)
