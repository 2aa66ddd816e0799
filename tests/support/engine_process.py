"""Runs an engine process and sends it the runtime's messages, for tests and benchmarks."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.model_state import Tier
from runtime.ipc import messages
from runtime.ipc.framing import FrameReader, encode_frame
from runtime.types import Checkpoint, GenerationRequest, LogprobParams, SamplingParams, StopParams

Prompts = list[tuple[str, "np.ndarray[Any, np.dtype[np.int32]]"]]
Asked = list[tuple[str, GenerationRequest]]
Due = tuple[float, str, GenerationRequest]  # seconds from the start, model id, request


@dataclass(slots=True)
class Timeline:
    """When each step's message came, and how many tokens it brought; seconds, one clock."""

    sent_s: float
    steps: list[tuple[float, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the requests, in the order of their sending
    first_s: dict[int, float] = field(default_factory=dict)  # request id → its first token
    last_s: dict[int, float] = field(default_factory=dict)  # request id → its last token
    counts: Counter[int] = field(default_factory=Counter)  # request id → its tokens
    gaps_s: list[float] = field(default_factory=list)
    late_first_s: list[float] = field(
        default_factory=list
    )  # from its sending to its first token, of prompts that came later

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.steps)

    @property
    def wall_s(self) -> float:
        return self.steps[-1][0] - self.sent_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


@dataclass(slots=True)
class Answer:
    """What a request of `Engine.replay` brought, in seconds from the start; infinite = never.

    Attributes:
        tier: where its model's weights were when it was submitted.
    """

    tier: Tier | None
    first_s: float = float("inf")
    end_s: float = float("inf")
    error: str = ""


class Engine:
    """One engine; `hello` says what it has. Blocking; one thread."""

    def __init__(self, connection: socket.socket, process: "subprocess.Popen[bytes]", started_s: float) -> None:
        self._connection = connection
        self._process = process
        decoder: msgspec.msgpack.Decoder[messages.Event] = msgspec.msgpack.Decoder(messages.Event)
        self._reader = FrameReader(decoder)
        self._encoder = msgspec.msgpack.Encoder()
        self._received: deque[messages.Event] = deque()
        self._next_id = 1
        self.stats: messages.EngineStats | None = None
        hello = self._receive(120)
        assert isinstance(hello, messages.Hello), hello
        self.hello = hello
        self.ready_s = time.perf_counter() - started_s

    def load(
        self, model_id: str, checkpoint: Checkpoint, timeout_s: float = 600, **options: Any
    ) -> tuple[messages.Loaded, float]:
        """Returns the facts and the seconds that it took. Raises RuntimeError with the engine's cause."""
        started = time.perf_counter()
        self.send(messages.Load(model_id, checkpoint, **options))
        while True:
            event = self._receive(timeout_s)
            if isinstance(event, messages.Loaded):
                return event, time.perf_counter() - started
            if isinstance(event, messages.LoadFailed):
                raise RuntimeError(f"{event.model_id}: {event.code} {event.message}")

    def load_all(self, checkpoints: Mapping[str, Checkpoint], at_once: int, timeout_s: float = 600) -> None:
        """Load models by id, at most `at_once` at a time. Raises RuntimeError with the engine's cause."""
        left = deque(checkpoints.items())
        loading: set[str] = set()
        while left or loading:
            while left and len(loading) < at_once:
                model_id, checkpoint = left.popleft()
                loading.add(model_id)
                self.send(messages.Load(model_id, checkpoint))
            event = self._receive(timeout_s)
            if isinstance(event, messages.Loaded):
                loading.remove(event.facts.model_id)
            elif isinstance(event, messages.LoadFailed):
                raise RuntimeError(f"{event.model_id}: {event.code} {event.message}")

    def unload(self, model_id: str) -> None:
        self.send(messages.Unload(model_id))
        while not isinstance(self._receive(60), messages.Unloaded):
            pass

    def generate(
        self, prompts: Prompts, output_tokens: int, timeout_s: float = 300, late: "tuple[float, Prompts] | None" = None
    ) -> Timeline:
        """Submit all prompts (model id, token ids) at once; greedy, EOS ignored; until the last is done. `late`: further prompts, each for one token,
        submitted that many seconds after the others."""
        asked = [(model_id, _greedy(ids, output_tokens)) for model_id, ids in prompts]
        return self.run(
            asked, timeout_s, None if late is None else (late[0], [(m, _greedy(ids, 1)) for m, ids in late[1]])
        )

    def run(self, asked: Asked, timeout_s: float = 300, late: "tuple[float, Asked] | None" = None) -> Timeline:
        """Submit all requests (model id, request) at once, until the last is done. `late`: see `generate`."""
        timeline = Timeline(time.perf_counter())
        last: dict[int, float] = {}
        late_sent_s: dict[int, float] = {}
        timeline.ids = [self._add(model_id, request) for model_id, request in asked]
        waiting = set(timeline.ids)
        while waiting:
            event = self._receive(timeout_s)
            if not isinstance(event, messages.Tokens):
                continue
            now = time.perf_counter()
            if late is not None and now - timeline.sent_s >= late[0]:
                for model_id, request in late[1]:
                    number = self._add(model_id, request)
                    waiting.add(number)
                    late_sent_s[number] = now
                late = None
            count = 0
            for row in event.rows:
                count += len(row.tokens)
                if row.tokens and row.request_id in late_sent_s:
                    timeline.late_first_s.append(now - late_sent_s[row.request_id])
                elif row.tokens:
                    if row.request_id in last:
                        timeline.gaps_s.append(now - last[row.request_id])
                    timeline.first_s.setdefault(row.request_id, now - timeline.sent_s)
                    last[row.request_id] = now
                    timeline.last_s[row.request_id] = now - timeline.sent_s
                    timeline.counts[row.request_id] += len(row.tokens)
                if row.finish is not None:
                    if row.error is not None:
                        raise RuntimeError(f"{event.model_id}: {row.error}")
                    waiting.discard(row.request_id)
            if count:
                timeline.steps.append((now, count))
        return timeline

    def run_beside(
        self, asked: Asked, others: Iterator[tuple[str, GenerationRequest]], timeout_s: float = 300
    ) -> Timeline:
        """Submit all requests at once and, until the last of them is done, those of `others` one after the other. Returns the timeline of `asked`."""
        timeline = Timeline(time.perf_counter())
        last: dict[int, float] = {}
        timeline.ids = [self._add(model_id, request) for model_id, request in asked]
        waiting = {*timeline.ids, self._add(*next(others))}
        own = set(timeline.ids)
        while waiting:
            event = self._receive(timeout_s)
            if not isinstance(event, messages.Tokens):
                continue
            now = time.perf_counter()
            count = 0
            for row in event.rows:
                if row.error is not None:
                    raise RuntimeError(f"{event.model_id}: {row.error}")
                if row.request_id in own and row.tokens:
                    count += len(row.tokens)
                    if row.request_id in last:
                        timeline.gaps_s.append(now - last[row.request_id])
                    last[row.request_id] = now
                if row.finish is not None:
                    waiting.discard(row.request_id)
                    if row.request_id not in own and waiting & own:
                        waiting.add(self._add(*next(others)))
            if count:
                timeline.steps.append((now, count))
        return timeline

    def run_paced(self, asked: Sequence[Due], timeout_s: float = 300) -> list[float]:
        """Like `replay`. Returns the seconds from when each request was due to its first token.

        Raises RuntimeError for a request that fails or brings no token.
        """
        answers = self.replay(asked, timeout_s)
        for (_, model_id, _), answer in zip(asked, answers, strict=True):
            if answer.error:
                raise RuntimeError(f"{model_id}: {answer.error}")
        silent = sum(answer.first_s == float("inf") for answer in answers)
        if silent:
            raise RuntimeError(f"{silent} of {len(asked)} requests brought no token")
        return [answer.first_s - due_s for (due_s, _, _), answer in zip(asked, answers, strict=True)]

    def replay(self, asked: Sequence[Due], timeout_s: float = 300) -> list[Answer]:
        """Submit each request when it is due, earliest first, until the last has ended. Failed requests have an error.

        Raises TimeoutError if the engine says nothing for `timeout_s` while all requests are submitted.
        """
        started_s = time.perf_counter()
        answers: list[Answer] = []
        places: dict[int, Answer] = {}
        num_ended = 0
        while num_ended < len(asked):
            now = time.perf_counter() - started_s
            while len(answers) < len(asked) and asked[len(answers)][0] <= now:
                _, model_id, request = asked[len(answers)]
                answer = Answer(self._tier(model_id))
                answers.append(answer)
                places[self._add(model_id, request)] = answer
            is_waiting = len(answers) < len(asked)
            try:
                event = self._receive(max(0.0, asked[len(answers)][0] - now) if is_waiting else timeout_s)
            except TimeoutError:
                if is_waiting:
                    continue
                raise
            if not isinstance(event, messages.Tokens):
                continue
            now = time.perf_counter() - started_s
            for row in event.rows:
                answer = places[row.request_id]
                if row.tokens:
                    answer.first_s = min(answer.first_s, now)
                if row.finish is not None:
                    answer.end_s, answer.error = now, row.error or ""
                    num_ended += 1
        return answers

    def _tier(self, model_id: str) -> Tier | None:
        """Return where the model's weights are, by the last figures. None: there are none of it yet."""
        models = self.stats.models if self.stats is not None else ()
        return next((figures.tier for figures in models if figures.model_id == model_id), None)

    def _add(self, model_id: str, request: GenerationRequest) -> int:
        number = self._next_id
        self._next_id += 1
        self.send(messages.Add(number, model_id, request))
        return number

    def texts(
        self, prompts: list[tuple[str, "np.ndarray[Any, np.dtype[np.int32]]"]], output_tokens: int
    ) -> list[list[int]]:
        """The token ids that each prompt brings, greedy, EOS ignored, all at once."""
        tokens: list[list[int]] = [[] for _ in prompts]
        for index, row in self._rows(prompts, output_tokens, LogprobParams()):
            tokens[index].extend(row.tokens)
        return tokens

    def prompt_logprobs(self, prompts: list[tuple[str, "np.ndarray[Any, np.dtype[np.int32]]"]]) -> list[list[float]]:
        """The log-probability of each prompt's tokens but the first, given those before."""
        scores: list[list[float]] = [[] for _ in prompts]
        for index, row in self._rows(prompts, 1, LogprobParams(prompt=0)):
            scores[index].extend(entry.logprob for entry in row.prompt_logprobs or () if entry is not None)
        return scores

    def rows(self, model_id: str, requests: Sequence[GenerationRequest]) -> list[list[messages.RowTokens]]:
        """Send all requests at once and return the rows of each."""
        rows: list[list[messages.RowTokens]] = [[] for _ in requests]
        for index, row in self._answers([(model_id, request) for request in requests]):
            rows[index].append(row)
        return rows

    def _rows(
        self,
        prompts: list[tuple[str, "np.ndarray[Any, np.dtype[np.int32]]"]],
        output_tokens: int,
        logprobs: LogprobParams,
    ) -> Iterator[tuple[int, messages.RowTokens]]:
        stop = StopParams(max_tokens=output_tokens, ignore_eos=True)
        return self._answers(
            [
                (
                    model_id,
                    GenerationRequest(
                        prompt=tuple(ids.tolist()),
                        sampling=SamplingParams(temperature=0.0),
                        stop=stop,
                        logprobs=logprobs,
                    ),
                )
                for model_id, ids in prompts
            ]
        )

    def _answers(self, requests: Sequence[tuple[str, GenerationRequest]]) -> Iterator[tuple[int, messages.RowTokens]]:
        first = self._next_id
        for model_id, request in requests:
            self._add(model_id, request)
        waiting = len(requests)
        while waiting:
            event = self._receive(300)
            for row in event.rows if isinstance(event, messages.Tokens) else ():
                if row.error is not None:
                    raise RuntimeError(row.error)
                yield row.request_id - first, row
                waiting -= row.finish is not None

    def wait_idle(self, seconds: float) -> None:
        """Let the engine do its idle work (graph captures), reading what it says."""
        deadline = time.perf_counter() + seconds
        while (left := deadline - time.perf_counter()) > 0:
            with contextlib.suppress(TimeoutError):
                self._receive(left)

    def send(self, command: messages.Command) -> None:
        self._connection.sendall(encode_frame(self._encoder, command))

    def _receive(self, timeout_s: float) -> messages.Event:
        deadline = time.perf_counter() + timeout_s
        while True:
            while self._received:
                event = self._received.popleft()
                if not isinstance(event, messages.EngineStats):
                    return event
                self.stats = event
            left = max(0.0, deadline - time.perf_counter())
            if not select.select([self._connection], [], [], left)[0]:
                raise TimeoutError(f"the engine said nothing for {timeout_s:g} s")
            data = self._connection.recv(1 << 20)
            if not data:
                raise RuntimeError(f"the engine ended with status {self._process.wait(10)}")
            self._received.extend(self._reader.feed(data))


def _greedy(ids: "np.ndarray[Any, np.dtype[np.int32]]", output_tokens: int) -> GenerationRequest:
    stop = StopParams(max_tokens=output_tokens, ignore_eos=True)
    return GenerationRequest(prompt=tuple(ids.tolist()), sampling=SamplingParams(temperature=0.0), stop=stop)


@contextlib.contextmanager
def engine(
    config: dict[str, Any], log: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[Engine]:
    """Start `python -m runtime.engine` with these EngineConfig fields, wait for its Hello, and end it with the block.

    `environment` replaces this process's variables.
    """
    with tempfile.TemporaryDirectory(prefix="repertory-engine-") as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/engine.sock"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(180)
        sink = stack.enter_context(log.open("ab")) if log is not None else None
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.engine", "--socket", path, "--config", json.dumps(config)],
            stdout=sink,
            stderr=sink,
            env=environment or os.environ.copy(),
        )
        stack.callback(_end, process)
        connection, _ = listener.accept()
        stack.enter_context(connection)
        yield Engine(connection, process, started)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
