"""Mask sources for tests: grammars whose allowed tokens are a pure function of the output so far.

"half" allows a pseudo-random half of the vocabulary that depends on every output token. "half/N" allows only token 0 after N tokens. "raises/N",
"exceeds/N" and "empty/N" are like "half", and break after N tokens. "often" allows a single token after seven outputs of eight.
"""

from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b

import numpy as np

from runtime.engine.grammar.interfaces import MaskSource, TokenMasks, mask_words
from runtime.engine.scheduler.bad_words import BadWords
from runtime.engine.scheduler.reasoning_limit import ReasoningLimit
from runtime.errors import InvalidRequest, RepertoryError
from runtime.ipc.messages import GrammarFigures
from runtime.types import Checkpoint, Grammar, ModelFacts


def allowed_tokens(grammar: str, output: Sequence[int], vocab_size: int) -> list[int]:
    """The tokens that may follow `output`; at least one."""
    kind, _, count = grammar.partition("/")
    if kind == "half" and count and len(output) >= int(count):
        return [0]
    digest = blake2b(repr((grammar, tuple(output))).encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    if kind == "often" and digest[-1] % 8:
        return [int(rng.integers(vocab_size))]
    chosen = np.flatnonzero(rng.random(vocab_size) < 0.5).tolist()
    return chosen or [int(rng.integers(vocab_size))]


def pack(tokens: Sequence[int], vocab_size: int) -> TokenMasks:
    """A mask of these tokens."""
    words = np.zeros(mask_words(vocab_size), np.int64)
    for token in tokens:
        words[token // 32] |= 1 << (token % 32)
    return words.astype(np.uint32).view(np.int32)


def unpack(words: TokenMasks, vocab_size: int) -> list[int]:
    """The tokens that a mask allows."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")[:vocab_size]
    tokens: list[int] = np.flatnonzero(bits).tolist()
    return tokens


class GrammarMasks:
    """One sequence's masks. `on_fill` is called before a mask is written."""

    def __init__(self, grammar: str, vocab_size: int, on_fill: Callable[[], None] = lambda: None) -> None:
        self.grammar = grammar
        self.accepted: list[int] = []
        self._vocab_size = vocab_size
        self._on_fill = on_fill

    def fill_mask(self, words: TokenMasks) -> None:
        self._on_fill()
        kind, _, count = self.grammar.partition("/")
        if kind in ("raises", "exceeds", "empty") and len(self.accepted) >= int(count):
            if kind == "raises":
                raise ValueError("the parser is stuck")
            if kind == "exceeds":
                raise InvalidRequest("too complex")
            return
        words[:] = pack(allowed_tokens(self.grammar, self.accepted, self._vocab_size), self._vocab_size)

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            kind = self.grammar.partition("/")[0]
            allowed = allowed_tokens(self.grammar, self.accepted, self._vocab_size)
            assert kind not in ("half", "often") or token in allowed, (
                f"token {token} after {self.accepted} is not allowed"
            )
            self.accepted.append(token)

    def forced(self) -> list[int]:
        forced: list[int] = []
        while self.grammar == "often":
            allowed = allowed_tokens(self.grammar, [*self.accepted, *forced], self._vocab_size)
            if len(allowed) > 1:
                break
            forced += allowed
        return forced

    @property
    def finished(self) -> bool:
        kind, _, count = self.grammar.partition("/")
        return kind == "half" and bool(count) and len(self.accepted) > int(count)

    is_spent = False


class FakeJob:
    """Implements MaskSourceJob: ready after `polls` looks."""

    def __init__(self, source: GrammarMasks | RepertoryError, polls: int) -> None:
        self._source = source
        self._polls = polls

    def ready(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def result(self) -> GrammarMasks:
        if isinstance(self._source, RepertoryError):
            raise self._source
        return self._source


class FakeMaskSources:
    """Implements MaskSources. Refuses the grammar "refused". `polls`: looks at a job before it is ready."""

    host_bytes = 0
    figures = GrammarFigures(grammars_total=3)

    def __init__(
        self, vocab_size: Callable[[str], int], on_fill: Callable[[], None] = lambda: None, polls: int = 0
    ) -> None:
        self._vocab_size = vocab_size
        self._on_fill = on_fill
        self._polls = polls
        self.opened: list[GrammarMasks] = []
        self.retained: frozenset[str] = frozenset()

    def open(self, checkpoint: Checkpoint, facts: ModelFacts, grammar: Grammar) -> FakeJob:
        if grammar.text == "refused":
            return FakeJob(InvalidRequest("the grammar has no rule named root"), self._polls)
        source = GrammarMasks(grammar.text, self._vocab_size(checkpoint.model_dir), self._on_fill)
        self.opened.append(source)
        return FakeJob(source, self._polls)

    def compute(self, sources: Sequence[MaskSource | None], words: TokenMasks) -> None:
        assert len(sources) == len(words)
        assert all(source is None or isinstance(source, GrammarMasks | BadWords | ReasoningLimit) for source in sources)

    def retain(self, model_dirs: Collection[str]) -> None:
        self.retained = frozenset(model_dirs)
