"""What each token adds to the text, as bytes, for the decoders where that depends on the token alone.

Byte-level BPE and sentencepiece-like decoders are such; for any other `decoding_of` says None and the detokenizer asks the tokenizer itself.
Knows the `decoder` section of tokenizer.json; knows nothing of streams.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from tokenizers import Tokenizer

START_KEEP = "keep"  # the text's first token is as any other
START_STRIP_ONE = "strip_one"  # one leading space of the text is dropped
START_STRIP_MARKS = "strip_marks"  # every space mark of the first token is dropped


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a vocabulary piece becomes bytes, and what happens at the very start of a text."""

    to_bytes: Callable[[str], bytes]
    at_start: str = START_KEEP


class TokenBytes(dict[int, bytes]):
    """Token id → bytes, filled as ids are met. Ids outside of the vocabulary, and special tokens if skipped, add nothing."""

    def __init__(self, tokenizer: Tokenizer, decoding: Decoding, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._to_bytes = decoding.to_bytes
        self._skipped = skipped

    def __missing__(self, token_id: int) -> bytes:
        piece = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        data = b"" if piece is None else self._to_bytes(piece)
        self[token_id] = data
        return data


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the other 68 bytes take U+0100 and following in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def decoding_of(tokenizer: Tokenizer) -> Decoding | None:
    """The decoder's rule, if each token's bytes stand alone."""
    decoder = msgspec.json.decode(tokenizer.to_str()).get("decoder")
    if decoder is None:
        return None
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Decoding(_byte_level())
    return _sentencepiece(steps)


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_level_alphabet()

    def to_bytes(piece: str) -> bytes:
        try:
            return bytes([alphabet[letter] for letter in piece])
        except KeyError:  # an added token: its content is text
            return piece.encode()

    return to_bytes


def _sentencepiece(steps: list[dict[str, Any]]) -> Decoding | None:
    replacements: list[tuple[str, str]] = []
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

    return Decoding(to_bytes, at_start)
