"""The engine thread: commands → whose turn → plan → launch → collect the launch before → one message.

At most two steps are in flight, over all models. This file is the order of a turn only: no policy, no bookkeeping, no torch, no I/O, no work per
row, and nothing that waits while a step could be launched.
"""

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.config.schema import EngineConfig
from runtime.engine.core.commands import Commands
from runtime.engine.core.executor import OperationExecutor
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.loads import Loads
from runtime.engine.core.model_table import ModelTable
from runtime.engine.core.step_budget import StepBudget
from runtime.engine.core.waits import WaitLimit
from runtime.engine.grammar.interfaces import MaskSources
from runtime.engine.interfaces import Backend, Drafter, Launched, StepOutput
from runtime.engine.operations import Operation
from runtime.engine.scheduler.masks import StepMasks, fill_masks
from runtime.engine.scheduler.model_round_robin import RoundRobin
from runtime.engine.scheduler.outputs import Step
from runtime.errors import RepertoryError
from runtime.ipc.messages import Command, Event, LoadFailed
from runtime.types import FinishReason

_STATS_EVERY_S = 1.0
_POLL_S = 0.005  # between looks at loads and swap-ins while the engine is idle
_GRAMMAR_POLL_S = 0.001  # a grammar is made in milliseconds
_PAUSE_S = 0.02  # A client's next request comes sooner than this after an answer, and would wait for a capture.
_WAITED = 1.25  # a step that took at most so many times as long as the weights that it waited for says nothing about computing
_FAULTS = 2  # failed steps in a row after which a model is unloaded


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step.

    Attributes:
        predicted_us: what the model was charged at the launch.
        weights_us: for how long the weights that the step waits for were expected to take.
    """

    model: LoadedModel
    step: Step
    launched: Launched
    tokens: int
    predicted_us: float
    weights_us: float


class EngineLoop:
    """Runs one engine.

    Args:
        inbox: commands; None means that the front has disconnected.
        emit: sends an event; it must not block.
        mark: records which model is about to run, to attribute a crash.
        clock: monotonic seconds.
        record: is called with every device operation before it is applied.
        mask_sources: makes the mask sources of requests with a grammar; None = such requests are refused.
        drafter: guesses tokens for all models; None = no speculation.
        settle: see OperationExecutor.
    """

    def __init__(
        self,
        config: EngineConfig,
        backend: Backend,
        inbox: "queue.SimpleQueue[Command | None]",
        emit: Callable[[Event], None],
        mark: Callable[[str], None],
        clock: Callable[[], float],
        record: Callable[[Operation], None] | None = None,
        mask_sources: MaskSources | None = None,
        drafter: Drafter | None = None,
        settle: Callable[[str], RepertoryError | None] = lambda model_id: None,
    ) -> None:
        self._executor = OperationExecutor(backend, mark, record, settle)
        self.table = ModelTable(config, backend, self._executor, emit, drafter, mask_sources)
        self._config = config
        self._backend = backend
        self._inbox = inbox
        self._clock = clock
        self._step_budget = StepBudget(self.table)
        self._wait_limit = WaitLimit(self.table, config.wait_budget_s)
        self._round_robin = RoundRobin(config.quantum_us)
        self._loads = Loads(self.table, self._collect_all_of)
        self._compute_masks = mask_sources.compute if mask_sources is not None else lambda sources, words: None
        self._commands = Commands(self.table, self._loads, self._round_robin, mask_sources)
        self._flights: deque[Flight] = deque()
        self._stats_due_s = 0.0
        self._worked_s = 0.0
        self._reported_busy = False
        self._reported_changes = 0
        self.done = False

    @property
    def num_loading(self) -> int:
        """Models whose load has begun and is not answered."""
        return len(self._loads)

    def run(self) -> None:
        """Turn until a Shutdown is complete or the front has disconnected. Raises the device's error if the device is lost; the process must end then."""
        while not self.done:
            if not self.turn():
                self._wait()
        self._close()

    def turn(self) -> bool:
        """Run one turn. Returns whether there was work."""
        now = self._clock()
        worked = self._take_commands(now)
        if len(self._loads):
            worked |= self._loads.poll(now)
        self._commands.poll(now)
        self._update_residency(now)
        while self._flights and self._flights[0].launched.ready():
            self._collect()
            worked = True
        launched = self._launch(now)
        if self._flights and (len(self._flights) > 1 or not launched):
            self._collect()
            worked = True
        self._wait_limit.apply(now)
        self._executor.flush()
        self.table.share.end_turn()
        if self._config.debug_checks:
            self.table.check()
        idle = not (worked or launched)
        if not idle:
            self._worked_s = self._clock()
        # Report the idle state at once, so that a query after the last answer does not see a running model.
        if (
            self.table.num_changes != self._reported_changes
            or now >= self._stats_due_s
            or (idle and self._reported_busy and not self._anything_left())
        ):
            self._emit_stats(now)
        stop_by_s = self._commands.stop_by_s
        if stop_by_s is not None and (now >= stop_by_s or not self._anything_left()):
            self.done = True
        return not idle

    def _emit_stats(self, now: float) -> None:
        self._reported_changes = self.table.num_changes
        self._stats_due_s = now + _STATS_EVERY_S
        stats = self.table.stats()
        self._reported_busy = any(model.running or model.waiting for model in stats.models)
        self.table.emit(stats)

    def _take_commands(self, now: float) -> bool:
        took = False
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return took
            self._handle(command, now)
            took = True

    def _handle(self, command: Command | None, now: float) -> None:
        if command is None:
            self.done = True
            return
        self._commands.apply(command, now)

    def _update_residency(self, now: float) -> None:
        """Bring weights in and out. A model whose swap-in fails is unloaded, the others stay."""
        self._executor.flush()  # swap-ins must have begun before they are polled
        self.table.exchange.update(now)
        self.table.resident.update(now)
        failed = {adapter.model_id: error for adapter, error in self.table.adapters.update(self.table.resident, now)}
        self._executor.flush()
        for model_id, error in {**failed, **self._executor.take_failed_swap_ins()}.items():
            text = f"its weights did not come in: {type(error).__name__}: {error}"
            if model_id in self.table.models:
                self._unload_broken(self.table.models[model_id], text)
            else:
                self._unload_broken_adapter(model_id, text)

    # Launching ------------------------------------------------------------------------------------------------------------------------------

    def _launch(self, now: float) -> bool:
        """Plan and launch one step of the model whose turn it is, or of the next model if that one has nothing to run."""
        active = {m.model_id: m for m in self.table.models.values() if m.resident and m.has_work()}
        arrived = {model_id: m for model_id, m in active.items() if not m.swapping}
        # A step of a model whose weights are still being copied would delay the other models' steps behind it.
        step_tokens = self._config.max_batch_tokens
        active = arrived or {model_id: m for model_id, m in active.items() if m.may_launch(step_tokens, now)}
        num_active = len(active)
        while active:
            model_id = self._round_robin.pick(active)
            if model_id is None:
                return False
            model = active.pop(model_id)
            # A model that was tried before may have evicted this one.
            if model.resident and self._launch_step(model, num_active, now):
                return True
        return False

    def _launch_step(self, model: LoadedModel, num_active: int, now: float) -> bool:
        step = model.scheduler.plan(self._step_budget.limits(model, num_active, now), now)
        if step is None:
            self._step_budget.handle_starvation(model, now)
            return False
        model.touch(now)
        self.table.resident.release_claim(model)
        tokens = step.plan.num_tokens
        predicted_us = model.cost.predict_us(tokens, step.kv_tokens, step.num_adapters)
        self._round_robin.charge(model.model_id, predicted_us)
        self._executor.flush()  # an error in here is not the step's
        masks: StepMasks | None = None
        failed: list[tuple[Flight, Exception]] = []
        try:
            if step.plan.masked:
                self._executor.launch_forward(model.model_id, step.opened, step.plan)
                failed = self._settle_before_draws(model)
                began_s = time.perf_counter()
                # while the device computes
                lines = self._executor.mask_lines(model.model_id, len(step.plan.masked))
                masks = fill_masks(step.masked_sequences(), lines, self._compute_masks)
                self.table.count_masks(len(masks.words), time.perf_counter() - began_s)
                launched = self._executor.launch_draws(model.model_id, masks.words)
            else:
                launched = self._executor.launch(model.model_id, step.opened, step.plan)
        except Exception as error:
            self._fault(model, step, error)
            return True
        self._flights.append(Flight(model, step, launched, tokens, predicted_us, model.await_weights(now) * 1e6))
        if masks is not None:
            for failure in masks.failures:
                self.table.end(model, [failure.sequence], FinishReason.ERROR, now, failure.code, failure.text)
        for flight, cause in failed:
            self._fault(flight.model, flight.step, cause)
        return True

    def _settle_before_draws(self, model: LoadedModel) -> list[tuple[Flight, Exception]]:
        """Settle the model's launched steps, on whose tokens the masks depend. Returns the steps that failed, to be handled after the draws."""
        failed: list[tuple[Flight, Exception]] = []
        while any(flight.model is model for flight in self._flights):
            flight = self._flights.popleft()
            try:
                result = flight.launched.collect()
            except Exception as error:
                failed.append((flight, error))
            else:
                self._settle(flight, result)
        return failed

    # Collecting --------------------------------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Wait for the oldest launched step and emit its tokens."""
        flight = self._flights.popleft()
        try:
            result = flight.launched.collect()
        except Exception as error:
            self._fault(flight.model, flight.step, error)
            return
        self._settle(flight, result)

    def _settle(self, flight: Flight, result: StepOutput) -> None:
        """Apply the result of a step and emit its tokens."""
        model, step = flight.model, flight.step
        if not step.void:
            model.clear_faults()
        # A step that waited for weights took about as long as they did, unless it computed for longer.
        if result.device_us > _WAITED * flight.weights_us:
            model.cost.observe(flight.tokens, step.kv_tokens, result.device_us, step.num_adapters)
            self._round_robin.charge(model.model_id, result.device_us - flight.predicted_us)
        rows = model.scheduler.settle(step, result, self._clock())
        self.table.emit_rows(model.model_id, rows)

    def _collect_all_of(self, model_id: str) -> None:
        """Collect every launched step up to the last one of this model."""
        while any(flight.model.model_id == model_id for flight in self._flights):
            self._collect()

    def _fault(self, model: LoadedModel, step: Step, error: Exception) -> None:
        """Fail the rows of a step that raised. The model is unloaded if this happens twice in a row."""
        self._executor.mark_running(model.model_id)  # not the model that was launched after it
        self._backend.synchronize()  # raises if the device itself is lost
        now = self._clock()
        counts = not step.void
        text = f"a step failed: {type(error).__name__}: {error}"
        lost = model.scheduler.fail(step, now)
        self.table.host_kv.forget(model.model_id)
        self.table.fail_rows(model, lost, text)
        if not counts:
            return
        faults = model.record_fault()
        if faults >= _FAULTS:
            self._unload_broken(model, f"{text} ({faults} times in a row)")

    def _unload_broken(self, model: LoadedModel, text: str) -> None:
        model.clear_faults()  # steps in flight may fail too, and must not unload the model again
        self._collect_all_of(model.model_id)
        self.table.unregister(model, FinishReason.ERROR, self._clock(), "INTERNAL", text)
        self._round_robin.forget(model.model_id)
        self.table.emit(LoadFailed(model.model_id, "INTERNAL", text))

    def _unload_broken_adapter(self, model_id: str, text: str) -> None:
        adapter = self.table.adapters.adapters[model_id]
        self._collect_all_of(adapter.base.model_id)
        # Settling may have found the base broken, and unloaded its adapters.
        if model_id in self.table.adapters.adapters:
            self.table.unregister_adapter(adapter, FinishReason.ERROR, self._clock(), "INTERNAL", text)
            self.table.emit(LoadFailed(model_id, "INTERNAL", text))

    # Waiting and the end ---------------------------------------------------------------------------------------------------------------------------

    def _anything_left(self) -> bool:
        return bool(self._flights or self._commands.num_opening) or any(
            m.scheduler.sequences() for m in self.table.models.values()
        )

    def idle(self, *, may_capture: bool = True) -> bool:
        """Do one piece of background work of the device, such as a graph capture. Returns whether there was one."""
        # Capturing a graph takes milliseconds, and a grammar that is being made is there sooner.
        return not self._commands.num_opening and self._executor.run_idle_work(may_capture=may_capture)

    def _wait(self) -> None:
        pause_s = self._worked_s + _PAUSE_S - self._clock()
        if self.idle(may_capture=pause_s <= 0):
            return
        models = self.table.models.values()
        swapping = next((m.model_id for m in models if m.swapping), "")
        self._executor.mark_running(swapping)  # a crash from now on has no other cause
        soon = bool(len(self._loads) or swapping) or any(len(m.scheduler.waiting) for m in models)
        if self._commands.num_opening:
            timeout_s = _GRAMMAR_POLL_S
        else:
            timeout_s = _POLL_S if soon else max(_POLL_S, self._stats_due_s - self._clock())
            timeout_s = timeout_s if pause_s <= 0 else min(timeout_s, pause_s)
        try:
            command = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        self._handle(command, self._clock())

    def _close(self) -> None:
        """End all requests, unload all models and release everything."""
        while self._flights:
            self._collect()
        self._loads.stop()
        self._commands.close()
        for model in list(self.table.models.values()):
            self.table.unregister(
                model,
                FinishReason.ERROR,
                self._clock(),
                "UNAVAILABLE",
                "the engine has shut down",
            )
        self._executor.mark_running("")
        self.table.slabs.check()
