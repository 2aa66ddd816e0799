"""An engine loop over a real backend, run until a list of requests is answered."""

import queue
from dataclasses import dataclass

from runtime import errors
from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.engine.device.backend import make_backend
from runtime.engine.grammar.mask_sources import GrammarMaskSources
from runtime.engine.interfaces import Drafter
from runtime.engine.operations import Operation, RunStep
from runtime.ipc.messages import Add, Command, Event, Load, Loaded, LoadFailed, RowTokens, Tokens, Unload
from runtime.types import Checkpoint, GenerationRequest


@dataclass
class EngineRun:
    """The rows of every request, the number of steps and how the model ran."""

    rows: list[list[RowTokens]]
    num_steps: int
    path: str

    def texts(self) -> list[list[int]]:
        return [[token for row in rows for token in row.tokens] for rows in self.rows]


def run_engine(
    checkpoint: Checkpoint,
    requests: list[GenerationRequest],
    *,
    device: str = "cpu",
    drafter: Drafter | None = None,
    fuse: bool = True,
) -> EngineRun:
    """Load a model, answer all requests together and close the engine."""
    config = EngineConfig(
        device=device,
        max_rows=16,
        max_batch_tokens=64,
        slab_bytes=1 << 21,
        device_budget_bytes=128 << 20,
        debug_checks=True,
        fuse=fuse,
    )
    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    now, events, operations = [0.0], list[Event](), list[Operation]()
    backend = make_backend(config)
    loop = EngineLoop(
        config,
        backend,
        inbox,
        events.append,
        lambda _: None,
        lambda: now[0],
        operations.append,
        GrammarMaskSources(),
        drafter,
    )
    inbox.put(Load("m", checkpoint))
    while not any(isinstance(event, Loaded) for event in events):
        loop.turn()
        assert not any(isinstance(event, LoadFailed) for event in events), events
    path = next(event.facts.path for event in events if isinstance(event, Loaded))
    for number, request in enumerate(requests):
        inbox.put(Add(number, "m", request))
    rows: list[list[RowTokens]] = [[] for _ in requests]
    while not all(said and said[-1].finish for said in rows):
        loop.turn()
        now[0] += 0.01
        for event in events:
            for row in event.rows if isinstance(event, Tokens) else ():
                assert row.error is None, row.error
                rows[row.request_id].append(row)
        events.clear()
    inbox.put(None)
    loop.run()
    backend.close()
    return EngineRun(rows, sum(isinstance(operation, RunStep) for operation in operations), path)


class RealEngine:
    """An engine loop on a CPU that a test drives: models and adapters come and go between its requests."""

    def __init__(self, **config: object) -> None:
        settings = {
            "device": "cpu", "max_rows": 16, "max_batch_tokens": 64, "slab_bytes": 1 << 18, "device_budget_bytes": 64 << 20, "debug_checks": True,
        }  # fmt: skip
        self.config = EngineConfig(**{**settings, **config})  # type: ignore[arg-type]
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._now = 0.0
        self._events: list[Event] = []
        self._backend = make_backend(self.config)
        self.loop = EngineLoop(
            self.config, self._backend, self._inbox, self._events.append, lambda _: None, lambda: self._now
        )
        self._number = 0

    def load(self, model_id: str, checkpoint: Checkpoint, adapter_of: str = "") -> Loaded:
        """Load a model or an adapter. Raises LoadFailed with the engine's cause."""
        self._inbox.put(Load(model_id, checkpoint, adapter_of=adapter_of))
        while True:
            self._turn()
            for event in self._take():
                if isinstance(event, Loaded):
                    return event
                if isinstance(event, LoadFailed):
                    raise errors.LoadFailed(event.message, model=event.model_id)

    def unload(self, model_id: str) -> None:
        self._inbox.put(Unload(model_id))
        self._turn()
        self._take()

    def run(self, requests: list[tuple[str, GenerationRequest]], *, may_fail: bool = False) -> list[list[RowTokens]]:
        """Send all requests at once and return the rows of each. An error fails the test unless `may_fail`."""
        first = self._number
        self._number += len(requests)
        for number, (model_id, request) in enumerate(requests, first):
            self._inbox.put(Add(number, model_id, request))
        rows: list[list[RowTokens]] = [[] for _ in requests]
        while not all(said and said[-1].finish for said in rows):
            self._turn()
            for event in self._take():
                for row in event.rows if isinstance(event, Tokens) else ():
                    assert may_fail or row.error is None, row.error
                    rows[row.request_id - first].append(row)
        return rows

    def texts(self, requests: list[tuple[str, GenerationRequest]]) -> list[list[int]]:
        return [[token for row in rows for token in row.tokens] for rows in self.run(requests)]

    def close(self) -> None:
        self._inbox.put(None)
        self.loop.run()
        self._backend.close()

    def _turn(self) -> None:
        self.loop.turn()
        self._now += 0.01

    def _take(self) -> list[Event]:
        events = self._events.copy()
        self._events.clear()
        return events
