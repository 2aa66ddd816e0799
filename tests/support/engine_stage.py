"""An engine loop on the fake backend and a clock of its own, with what every request should have answered."""

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.engine.interfaces import Drafter, KvGeometry
from runtime.engine.operations import Operation
from runtime.ipc.messages import (
    Abort,
    Add,
    EngineStats,
    Event,
    Load,
    Loaded,
    LoadFailed,
    Resize,
    RowTokens,
    Shutdown,
    TokenLogprobs,
    Tokens,
    Unload,
    Unloaded,
)
from runtime.types import (
    Checkpoint,
    FinishReason,
    GenerationRequest,
    Grammar,
    LogprobParams,
    Pooling,
    ReasoningBudget,
    SamplingParams,
    StopParams,
)
from tests.support.fake_backend import FakeBackend
from tests.support.fake_runner import FakeRunner
from tests.support.fake_specs import FakeSpec, draw
from tests.support.masks import FakeMaskSources, allowed_tokens

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Answer:
    add: Add
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int | None = None
    last: RowTokens | None = None

    @property
    def finish(self) -> FinishReason | None:
        return None if self.last is None else self.last.finish

    @property
    def prompt(self) -> list[int]:
        return list(self.add.request.prompt)


def expected(add: Add, spec: FakeSpec, voice: str) -> tuple[list[int], FinishReason]:
    """What a request answers that has the engine to itself. `voice` is the name that its tokens are drawn by."""
    ids = list(add.request.prompt)
    prompt_len = len(ids)
    stop = add.request.stop
    eos = () if stop.ignore_eos else spec.eos
    ends = set(eos) | set(stop.stop_token_ids)
    while True:
        drawn = len(ids) - prompt_len
        if drawn == stop.max_tokens:
            return ids[prompt_len:], FinishReason.LENGTH
        if len(ids) == spec.max_model_len:
            return ids[prompt_len:], FinishReason.CONTEXT
        suppressed = tuple(sorted(ends)) if drawn < stop.min_tokens else ()
        grammar = add.request.grammar
        allowed = None if grammar is None else allowed_tokens(grammar.text, ids[prompt_len:], spec.vocab)
        if add.request.bad_words:
            output = tuple(ids[prompt_len:])
            banned = {word[-1] for word in add.request.bad_words if output[len(output) - len(word) + 1 :] == word[:-1]}
            allowed = [token for token in (range(spec.vocab) if allowed is None else allowed) if token not in banned]
        token = draw(voice, ids, spec.vocab, suppressed, allowed)
        ids.append(token)
        if token in ends and drawn >= stop.min_tokens:
            own = token in stop.stop_token_ids
            return ids[prompt_len:], FinishReason.STOP_TOKEN if own else FinishReason.EOS
        if grammar is not None and grammar.text.startswith("half/") and drawn >= int(grammar.text[5:]):
            return ids[prompt_len:], FinishReason.EOS


class Stage:
    """Drives a loop turn by turn; time passes `turn_s` a turn."""

    def __init__(
        self,
        backend: FakeBackend,
        *,
        turn_s: float = 0.005,
        record: Callable[[Operation], None] | None = None,
        mask_sources: bool = True,
        drafter: Drafter | None = None,
        grammar_polls: int = 0,
        **config: object,
    ) -> None:
        self.backend = backend
        self.now = 100.0
        self.turn_s = turn_s
        self.events: list[Event] = []
        self.answers: dict[int, Answer] = {}
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.marks: list[str] = []
        settings = EngineConfig(
            **{  # type: ignore[arg-type]
                "debug_checks": True,
                "max_rows": backend.max_rows,
                "max_batch_tokens": backend.max_batch_tokens,
                **config,
            }
        )
        self.mask_sources = FakeMaskSources(
            lambda name: backend.voice_of(name)[1].vocab, self._check_forward_launched, grammar_polls
        )
        self.loop = EngineLoop(
            settings,
            backend,
            self.inbox,  # type: ignore[arg-type]
            self._emit,
            self.marks.append,
            lambda: self.now,
            record,
            self.mask_sources if mask_sources else None,
            drafter,
        )
        self._ids = 0

    def _check_forward_launched(self) -> None:
        if self.backend.undrawn_plans() != 1:
            self.backend.broken_rules.append("a mask was wanted before the forward pass was launched")

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Tokens):
            return
        for row in event.rows:
            answer = self.answers[row.request_id]
            assert answer.last is None, "a row after the last"
            adapter = self.backend.adapters.get(answer.add.model_id)
            assert event.model_id in (answer.add.model_id, adapter and adapter.base)
            answer.tokens += row.tokens
            answer.logprobs += row.logprobs or ()
            if row.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None
                answer.prompt_logprobs = row.prompt_logprobs
            if row.cached_tokens is not None:
                assert answer.cached_tokens is None
                answer.cached_tokens = row.cached_tokens
            if row.finish is not None:
                answer.last = row

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop.turn()
            self.now += self.turn_s

    def load(self, model_id: str, **more: object) -> None:
        self.inbox.put(Load(model_id, Checkpoint(model_dir=model_id), **more))  # type: ignore[arg-type]

    def load_adapter(self, model_id: str) -> None:
        """Load an adapter of the backend's `adapters`. Its files are named by their content."""
        spec = self.backend.adapters[model_id]
        self.inbox.put(Load(model_id, Checkpoint(model_dir=spec.content), adapter_of=spec.base))

    def unload(self, model_id: str) -> None:
        self.inbox.put(Unload(model_id))

    def add(
        self,
        model_id: str,
        prompt: list[int],
        max_tokens: int = 16,
        *,
        sampling: SamplingParams = GREEDY,
        logprobs: LogprobParams | None = None,
        priority: int = 0,
        grammar: str | None = None,
        pooling: tuple[Pooling, ...] = (),
        bad_words: tuple[tuple[int, ...], ...] = (),
        reasoning_budget: ReasoningBudget | None = None,
        **stop: object,
    ) -> Answer:
        self._ids += 1
        add = Add(
            self._ids,
            model_id,
            GenerationRequest(
                prompt=tuple(prompt),
                sampling=sampling,
                stop=StopParams(max_tokens, **stop),  # type: ignore[arg-type]
                logprobs=logprobs or LogprobParams(),
                priority=priority,
                grammar=None if grammar is None else Grammar(grammar),
                pooling=pooling,
                bad_words=bad_words,
                reasoning_budget=reasoning_budget,
            ),
        )
        answer = self.answers[self._ids] = Answer(add)
        self.inbox.put(add)
        return answer

    def abort(self, *request_ids: int) -> None:
        self.inbox.put(Abort(request_ids))

    def resize(self, number: int, num_slabs: int, *evict: str, drain: bool = False) -> None:
        self.inbox.put(Resize(number, num_slabs, evict, drain))

    def shutdown(self, grace_s: float) -> None:
        self.inbox.put(Shutdown(grace_s))

    def until_quiet(self, most_turns: int = 20_000) -> None:
        """Turn until every request has ended and every load is answered."""
        for _ in range(most_turns):
            self.turn()
            if (
                self.inbox.empty()
                and not self.loop.num_loading
                and all(a.last is not None for a in self.answers.values())
            ):
                self.turn(3)
                return
        waiting = [(i, a.add.model_id, len(a.tokens)) for i, a in self.answers.items() if a.last is None]
        raise AssertionError(f"these never ended: {waiting}; {self.loop.table.stats()}")

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def loaded(self) -> list[str]:
        return [event.facts.model_id for event in self.of(Loaded)]  # type: ignore[union-attr]

    def failures(self) -> list[LoadFailed]:
        return self.of(LoadFailed)  # type: ignore[return-value]

    def unloaded(self) -> list[str]:
        return [event.model_id for event in self.of(Unloaded)]  # type: ignore[union-attr]

    def stats(self) -> EngineStats:
        return self.loop.table.stats()

    def check_text(self, answer: Answer) -> None:
        voice, spec = self.backend.voice_of(answer.add.model_id)
        text, finish = expected(answer.add, spec, voice)
        if answer.finish in (FinishReason.ABORTED, FinishReason.ERROR):
            assert answer.tokens == text[: len(answer.tokens)]
            return
        assert (answer.tokens, answer.finish) == (text, finish), f"{answer.add}"
        assert answer.last is not None
        if finish in (FinishReason.EOS, FinishReason.STOP_TOKEN):
            assert answer.last.stop_token == text[-1]
        if answer.add.request.logprobs.generated is not None:
            history = answer.prompt
            for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
                history.append(token)
                assert logprob == FakeRunner.logprob(history)
        if answer.add.request.pooling:
            assert answer.last.vector is not None
            vectors = FakeRunner.vectors(answer.prompt, answer.add.request.pooling)
            np.testing.assert_allclose(np.frombuffer(answer.last.vector, np.float32), vectors, rtol=1e-5)
        if answer.add.request.logprobs.prompt is not None:
            prompt = answer.prompt
            entries = [None, *(FakeRunner.logprob(prompt[: i + 1]) for i in range(1, len(prompt)))]
            assert answer.prompt_logprobs == tuple(entries)

    def check_all(self) -> None:
        assert not self.backend.broken_rules
        for answer in self.answers.values():
            self.check_text(answer)

    def close(self) -> None:
        """End the loop; nothing may stay lent, mapped or open."""
        self.inbox.put(None)
        self.loop.run()
        assert not self.backend.broken_rules
        assert self.loop.table.slabs.free == self.loop.table.slabs.committed == len(self.backend.committed)
        assert self.loop.table.rows.free == self.loop.table.rows.total
        assert self.backend.mapped == 0
        assert not self.backend.open_rows
        assert all(memory.closed for memory in self.backend.memories)
        assert all(memory.closed for memory in self.backend.adapter_memories)
        assert all(bank.closed for bank in self.backend.banks)
        assert all(runner.closed for runner in self.backend.runners)
        assert all(answer.last is not None for answer in self.answers.values())


def stage(
    names: str = "ab",
    *,
    total_slabs: int = 32,
    turn_s: float = 0.005,
    config: dict[str, Any] | None = None,
    **spec: object,
) -> Stage:
    """Return a stage whose fake backend has loaded the models `names`, one letter each. `spec`: fields of all of them."""
    roomy = KvGeometry(4, 32, 32, 1, 32, 64)  # 128 tokens a slab
    specs = {name: FakeSpec(**{"eos": (), "kv": roomy, **spec}) for name in names}  # type: ignore[arg-type]
    made = Stage(FakeBackend(specs, total_slabs=total_slabs), turn_s=turn_s, **(config or {}))
    for name in names:
        made.load(name)
    made.turn(10)
    assert sorted(made.loaded() + [f.model_id for f in made.failures()]) == sorted(names)
    return made


def error_of(answer: Answer) -> tuple[str | None, str]:
    """Return the code and the text of the error with which an answer ended."""
    assert answer.last is not None
    assert answer.finish is FinishReason.ERROR
    return answer.last.error_code, answer.last.error or ""
