"""Serves traces in virtual time: with the engine's own loop over a simulated device, and as one vLLM that sleeps and wakes."""

import queue
from collections.abc import Mapping, Sequence

import numpy as np

from bench.simulated_device import SLAB_BYTES, SimulatedDevice, SimulatedModel, VirtualClock
from bench.trace_outcome import Outcome, Served
from bench.trace_workload import Request
from common.model_state import Tier
from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.ipc.messages import Add, Command, Event, Load, Tokens
from runtime.types import Checkpoint, GenerationRequest, SamplingParams, StopParams

_POLL_S = 0.005
_VLLM_SWITCH_S = {"8B/bf16": 1.15, "8B/nf4": 0.82}  # docs/benchmarks/switching.md
_VLLM_SMALL_SWITCH_S = 0.72


class SimulatedEngine:
    """The engine loop over a device in virtual time, with all models loaded.

    Args:
        overlap: whether copies run beside steps.
    """

    def __init__(
        self,
        models: Mapping[str, SimulatedModel],
        device_bytes: int,
        host_bytes: int,
        *,
        overlap: bool = True,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        self._clock = VirtualClock()
        self._device = SimulatedDevice(
            models, self._clock, device_bytes, host_bytes, overlap=overlap, slab_bytes=slab_bytes
        )
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._next_id = 0
        self._rng = np.random.default_rng(1)
        self._loop = EngineLoop(
            EngineConfig(device="cpu", device_budget_bytes=device_bytes, slab_bytes=slab_bytes),
            self._device,
            self._inbox,
            self._events.append,
            lambda model_id: None,
            self._clock,
        )
        for model_id, model in models.items():
            self._inbox.put(Load(model_id, Checkpoint(model_id, weight_bytes=model.weight_bytes)))
        while len(self._loop.table.models) < len(models):
            self._loop.turn()
            self._clock.advance(self._clock.now_s + _POLL_S)

    def serve(self, trace: Sequence[Request]) -> Outcome:
        """Serve a trace from now on, until the last request has ended."""
        self._events.clear()
        models = self._loop.table.models
        resident = frozenset(model_id for model_id, model in models.items() if model.resident)
        started_s, copied_before = self._clock.now_s, self._device.copied_bytes
        served = [Served(request) for request in trace]
        first_id = self._next_id
        waiting, next_at = 0, 0
        while next_at < len(trace) or waiting:
            while next_at < len(trace) and started_s + trace[next_at].at_s <= self._clock.now_s:
                request = trace[next_at]
                loaded = models[request.model_id]
                served[next_at].tier = Tier.DEVICE if loaded.resident else loaded.lower_tier
                self._inbox.put(Add(first_id + next_at, request.model_id, make_request(request, self._rng, 30_000)))
                next_at += 1
                waiting += 1
            worked = self._loop.turn()
            now = self._clock.now_s - started_s
            for event in self._events:
                for row in event.rows if isinstance(event, Tokens) else ():
                    one = served[row.request_id - first_id]
                    if row.tokens:
                        one.first_s = min(one.first_s, now)
                    if row.finish is not None:
                        one.end_s, one.error = now, row.error or ""
                        waiting -= 1
            self._events.clear()
            if not worked and not self._loop.idle():
                arrival_s = started_s + trace[next_at].at_s if next_at < len(trace) else float("inf")
                busy_s = self._clock.now_s + _POLL_S if waiting else float("inf")
                self._clock.advance(min(arrival_s, self._clock.next_due_s(), busy_s))
        self._next_id += len(trace)
        return Outcome(served, self._device.copied_bytes - copied_before, self._clock.now_s - started_s, resident)


def make_request(request: Request, rng: np.random.Generator, vocab: int) -> GenerationRequest:
    """Return a greedy request with a random prompt, which ends after all of its tokens."""
    prompt = tuple(rng.integers(100, vocab, request.prompt_tokens).tolist())
    return GenerationRequest(
        prompt=prompt, sampling=SamplingParams(temperature=0.0), stop=StopParams(request.output_tokens, ignore_eos=True)
    )


def serve_as_vllm(models: Mapping[str, SimulatedModel], trace: Sequence[Request]) -> Outcome:
    """Serve the trace as one vLLM would that sleeps and wakes: one model at a time, until no request of it is left; then the longest waiting one."""
    served = [Served(request) for request in trace]
    waiting: list[Served] = []
    now, next_at, awake = 0.0, 0, ""
    while next_at < len(trace) or waiting:
        while next_at < len(trace) and trace[next_at].at_s <= now:
            waiting.append(served[next_at])
            next_at += 1
        if not waiting:
            now = trace[next_at].at_s
            continue
        model_id = min(waiting, key=lambda one: one.request.at_s).request.model_id
        model = models[model_id]
        if model_id != awake:
            now += _VLLM_SWITCH_S.get(model.kind, _VLLM_SMALL_SWITCH_S)
            awake = model_id
        rows: dict[int, tuple[Served, int]] = {}
        while True:  # until the model has no request
            while next_at < len(trace) and trace[next_at].at_s <= now:
                waiting.append(served[next_at])
                next_at += 1
            joined = [one for one in waiting if one.request.model_id == model_id]
            waiting = [one for one in waiting if one.request.model_id != model_id]
            rows |= {id(one): (one, 0) for one in joined}
            if not rows:
                break
            prompts = sum(one.request.prompt_tokens for one in joined)
            context = sum(one.request.prompt_tokens + done for one, done in rows.values())
            now += model.step_s(prompts + len(rows) - len(joined), context)
            for key, (one, done) in list(rows.items()):
                one.first_s = min(one.first_s, now)
                if done + 1 >= one.request.output_tokens:
                    one.end_s = now
                    del rows[key]
                else:
                    rows[key] = (one, done + 1)
    return Outcome(served, 0, now)
