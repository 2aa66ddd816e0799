"""Drafters for tests: two guesses per step, of which some are wrong."""

from collections.abc import Sequence
from zlib import crc32

from tests.support.fake_specs import draw


def _spoilt(tokens: Sequence[int]) -> bool:
    """Whether the guess of the last of these tokens is to be wrong: about one in three."""
    return crc32(repr(tuple(tokens)).encode()) % 3 == 0


class TextDrafter:
    """Guesses from texts that are known: prompts with their outputs."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [list(text) for text in texts]
        self.num_proposed = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        known = list(tokens)
        text = next(text for text in self._texts if text[: len(known)] == known)
        drafts: list[int] = []
        for token in text[len(known) :][: min(2, most)]:
            drafts.append(token + 1 if _spoilt([*known, *drafts, token]) and token else token)
        self.num_proposed += len(drafts)
        return drafts


class FakeDrafter:
    """Guesses what one of the fake backend's models would say."""

    def __init__(self, model_ids: Sequence[str], vocab: int) -> None:
        self._model_ids = model_ids
        self._vocab = vocab

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        known = list(tokens)
        for _ in range(min(2, most)):
            model_id = self._model_ids[crc32(repr(known).encode()) % len(self._model_ids)]
            known.append(draw(model_id, known, self._vocab))
        return known[len(tokens) :]
