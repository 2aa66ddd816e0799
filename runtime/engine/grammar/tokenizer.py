"""The engine's view of a checkpoint's tokenizer: which text each token adds, as llguidance needs it to compute masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Resident memory of one tokenizer, measured with llguidance 1.9.1: 55 MB with 49,152 tokens, 84 MB with 131,072.
_FIXED_BYTES = 38_000_000
_BYTES_PER_TOKEN = 350


@dataclass(frozen=True, slots=True)
class GrammarTokenizer:
    """One tokenizer for a model of `vocab_size` logits."""

    library: "LLTokenizer"
    vocab_size: int

    @property
    def size_bytes(self) -> int:
        return _FIXED_BYTES + _BYTES_PER_TOKEN * self.vocab_size

    @property
    def num_words(self) -> int:
        """The width of a mask as the library writes it."""
        return mask_words(self.library.vocab_size)

    def fill(self, matcher: "LLMatcher", words: TokenMasks) -> None:
        """Write the matcher's mask to `words` [mask_words(vocab_size)]."""
        target = words if self.num_words == len(words) else np.zeros(self.num_words, np.int32)
        matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if target is not words:
            words[:] = target[: len(words)]
        self.cut(words)

    def cut(self, words: TokenMasks) -> None:
        """Clear the tokens of a mask that the model has no logits for."""
        if self.library.vocab_size > self.vocab_size and self.vocab_size % 32:
            words[-1] &= (1 << self.vocab_size % 32) - 1


def read_tokenizer(text: str, vocab_size: int, ends: Sequence[int]) -> GrammarTokenizer:
    """Build the tokenizer from tokenizer.json. It takes 0.25 s for 49,152 tokens, mostly without the interpreter's lock.

    Raises InvalidRequest for a kind of tokenizer that the library cannot read.
    """
    from llguidance import LLTokenizer

    # Where the model has no end token the library chooses one. Drawing that one finishes the grammar.
    known = sorted(end for end in set(ends) if 0 <= end < vocab_size) or None
    try:
        try:
            library = LLTokenizer(text, n_vocab=vocab_size, eos_token=known)
        except ValueError as error:
            if "too small" not in str(error):
                raise
            library = LLTokenizer(text, eos_token=known)  # it has tokens that the model was never given
    except ValueError as error:
        raise InvalidRequest(f"its tokenizer cannot be used with a grammar: {error}") from error
    return GrammarTokenizer(library, vocab_size)
