"""Looks at grammars from outside: does one accept a text, and what do random draws make of it?"""

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common.model_key import Quantization
from runtime.engine.grammar.interfaces import mask_words
from runtime.engine.grammar.mask_sources import GrammarMaskSources
from runtime.types import Checkpoint, Grammar, ModelFacts
from tests.support.masks import unpack


class GrammarReader:
    """Follows grammars with the tokenizer of a folder."""

    def __init__(self, folder: Path, *, eos: int = 0) -> None:
        self.eos = eos
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._checkpoint = Checkpoint(str(folder))
        self._sources = GrammarMaskSources()
        self.vocab_size = int(self.tokenizer.get_vocab_size())
        self._facts = ModelFacts(
            "m", "", "", "float32", Quantization.NONE, 0, 0, 100, self.vocab_size, 0, eos_token_ids=(eos,)
        )

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether `text` is a whole text of the grammar."""
        source = self._sources.open(self._checkpoint, self._facts, grammar).result()
        words = np.zeros(mask_words(self.vocab_size), np.int32)
        for token in [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.eos]:
            if source.finished:
                return token == self.eos
            source.fill_mask(words)
            if token not in unpack(words, self.vocab_size):
                return False
            source.accept((token,))
        return True

    def random_text(self, grammar: Grammar, rng: random.Random, most: int = 400) -> str | None:
        """Draw tokens that the masks allow, often one that closes something. None if the text does not end within `most` tokens."""
        source = self._sources.open(self._checkpoint, self._facts, grammar).result()
        words = np.zeros(mask_words(self.vocab_size), np.int32)
        tokens: list[int] = []
        while len(tokens) < most:
            forced = list(source.forced())
            source.accept(forced)
            tokens += forced
            if source.finished:
                return self._text(tokens)
            source.fill_mask(words)
            allowed = unpack(words, self.vocab_size)
            closing = [token for token in allowed if token == self.eos or self._piece(token)[:1] in ('"', "}", "]")]
            token = rng.choice(closing if closing and rng.random() < 0.6 else allowed)
            if token == self.eos:
                return self._text(tokens)
            source.accept((token,))
            tokens.append(token)
        return None

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def _piece(self, token: int) -> str:
        return self.tokenizer.id_to_token(token) or ""
