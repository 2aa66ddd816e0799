"""Makes the mask sources of requests with a grammar, in threads beside the engine's own.

A tokenizer takes a quarter of a second to build, and a grammar milliseconds. Tokenizers are kept by content, for as long as a model uses them.
Grammars are kept in a bounded cache, of which every sequence gets a copy (lanes.py).
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from runtime.engine.grammar.guided_sequence import GuidedSequence, first_line
from runtime.engine.grammar.interfaces import MaskSource, MaskSourceJob, TokenMasks, mask_words
from runtime.engine.grammar.lanes import GrammarLanes
from runtime.engine.grammar.tokenizer import GrammarTokenizer, read_tokenizer
from runtime.errors import EngineFault, InvalidRequest, NotSupported, RepertoryError
from runtime.ipc.messages import GrammarFigures
from runtime.types import Checkpoint, Grammar, ModelFacts

if TYPE_CHECKING:
    from llguidance import LLExecutor

_THREADS = 2
_MOST_FILL_THREADS = 16
# The work for one token. The largest cost measured within these is 8 ms, 20 µs as a rule.
_STEP_ITEMS = 8_000
_STEP_LEXER_FUEL = 60_000


@dataclass(frozen=True, slots=True)
class _Job:
    """Implements MaskSourceJob over a future."""

    future: "Future[MaskSource]"

    def ready(self) -> bool:
        return self.future.done()

    def result(self) -> MaskSource:
        error = self.future.exception()
        if error is None or isinstance(error, RepertoryError):
            return self.future.result()
        # Whatever it is, a panic of a library included, it must not end the engine thread.
        raise EngineFault(f"its grammar cannot be prepared: {type(error).__name__}: {error}") from error


class GrammarMaskSources:
    """Implements MaskSources with llguidance, which is imported when the first request with a grammar comes."""

    def __init__(self, fill_threads: int | None = None) -> None:
        """`fill_threads`: threads that compute the masks of one step together; None = half of the cores, at most 16."""
        self._fill_threads = fill_threads or max(1, min(_MOST_FILL_THREADS, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(_THREADS, "grammar")
        self._lock = Lock()
        self._keys: dict[str, bytes] = {}  # of tokenizers, by the model's folder
        self._tokenizers: dict[bytes, Future[GrammarTokenizer]] = {}
        self._lanes = GrammarLanes(self._fill_threads)
        self._figures = GrammarFigures()
        self._executor: LLExecutor | None = None

    def open(self, checkpoint: Checkpoint, facts: ModelFacts, grammar: Grammar) -> MaskSourceJob:
        return _Job(self._pool.submit(self._make, checkpoint.model_dir, facts, grammar))

    def compute(self, sources: Sequence[MaskSource | None], words: TokenMasks) -> None:
        width = words.shape[1]
        found = [
            (line, source)
            for line, source in enumerate(sources)
            if isinstance(source, GuidedSequence) and source.awaits_mask and source.tokenizer.num_words == width
        ]
        address, stride = words.ctypes.data, width * words.itemsize
        if len({source.lane for _, source in found}) < 2 or self._fill_threads < 2:
            for line, source in found:
                source.matcher.unsafe_compute_mask_ptr(address + line * stride, stride)
                source.note_computed()
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._fill_threads)
        found.sort(key=lambda item: item[1].lane)  # neighbours go to one thread
        work = [(source.matcher, line) for line, source in found]
        self._executor.unsafe_compute_mask_ptr(work, address, stride, len(words))
        for _, source in found:
            source.note_computed()

    def retain(self, model_dirs: Collection[str]) -> None:
        with self._lock:
            self._keys = {folder: key for folder, key in self._keys.items() if folder in model_dirs}
            kept = set(self._keys.values())
            self._tokenizers = {key: made for key, made in self._tokenizers.items() if key in kept or not made.done()}
            self._lanes.retain(self._tokenizers.keys())

    @property
    def host_bytes(self) -> int:
        with self._lock:
            made = [future for future in self._tokenizers.values() if future.done() and future.exception() is None]
        return sum(future.result().size_bytes for future in made)

    @property
    def figures(self) -> GrammarFigures:
        return self._figures

    def _make(self, model_dir: str, facts: ModelFacts, grammar: Grammar) -> MaskSource:
        try:
            import llguidance
        except ImportError as error:
            raise NotSupported(
                "this server cannot constrain the output, because the package llguidance is not installed beside the engine"
            ) from error
        key, tokenizer = self._tokenizer(model_dir, facts)
        with self._lock:
            lane = self._lanes.find(key, grammar.text)
            if lane is not None:
                self._count(known_grammars_total=1)
                return lane.open(tokenizer, grammar)
        began_s = time.perf_counter()
        limits = llguidance.LLParserLimits(step_max_items=_STEP_ITEMS, step_lexer_fuel=_STEP_LEXER_FUEL)
        matcher = llguidance.LLMatcher(tokenizer.library, grammar.text, log_level=0, limits=limits)
        if not matcher.is_error():
            # The first mask finds what only the vocabulary shows to be too complex, and copies share its work.
            tokenizer.fill(matcher, np.zeros(mask_words(tokenizer.vocab_size), np.int32))
        if matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be used with this model: {first_line(matcher.get_error())}")
        with self._lock:
            self._count(grammars_total=1, grammar_seconds_total=time.perf_counter() - began_s)
            return self._lanes.add(key, grammar.text, matcher).open(tokenizer, grammar)

    def _tokenizer(self, model_dir: str, facts: ModelFacts) -> tuple[bytes, GrammarTokenizer]:
        """Return the tokenizer and its key. One thread builds it, the others wait."""
        with self._lock:
            key = self._keys.get(model_dir)
            if key is not None:
                future = self._tokenizers[key]
        if key is not None:
            return key, future.result()
        try:
            text = Path(model_dir, "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise InvalidRequest(f"it has no readable tokenizer.json, which a grammar needs: {error}") from error
        key = blake2b(f"{facts.vocab_size} {facts.eos_token_ids} {text}".encode(), digest_size=16).digest()
        with self._lock:
            future = self._tokenizers.get(key) or Future()
            builds = key not in self._tokenizers
            self._keys[model_dir], self._tokenizers[key] = key, future
        if builds:
            began_s = time.perf_counter()
            _complete(future, lambda: read_tokenizer(text, facts.vocab_size, facts.eos_token_ids))
            with self._lock:
                self._count(tokenizers_total=1, tokenizer_seconds_total=time.perf_counter() - began_s)
        return key, future.result()

    def _count(self, **added: float) -> None:
        """Add to the figures. The lock must be held."""
        before = msgspec.structs.asdict(self._figures)
        self._figures = GrammarFigures(**{**before, **{name: before[name] + value for name, value in added.items()}})


def _complete(future: "Future[GrammarTokenizer]", make: Callable[[], GrammarTokenizer]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:  # a panic too: requests wait for the future
        future.set_exception(error)
