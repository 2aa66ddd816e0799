"""Applies the commands of the front: requests, aborts and shutdown. Loads and unloads are in loads.py."""

from dataclasses import dataclass, field

from runtime.engine.core.end_times import first_end_s
from runtime.engine.core.loaded_adapter import LoadedAdapter
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.loads import Loads
from runtime.engine.core.model_table import ModelTable
from runtime.engine.grammar.interfaces import MaskSource, MaskSourceJob, MaskSources
from runtime.engine.scheduler.bad_words import BadWords
from runtime.engine.scheduler.model_round_robin import RoundRobin
from runtime.engine.scheduler.reasoning_limit import ReasoningLimit
from runtime.engine.scheduler.sequence import from_add
from runtime.errors import NotSupported, RepertoryError
from runtime.ipc.messages import Abort, Add, Command, Load, Resize, RowTokens, Shutdown, Unload
from runtime.types import FinishReason


@dataclass(frozen=True, slots=True)
class _Opening:
    """A request whose mask source is being made. It keeps its place in the order of arrival."""

    add: Add
    model: LoadedModel
    adapter: LoadedAdapter | None
    arrival: int
    arrived_s: float
    job: MaskSourceJob | None


@dataclass(slots=True)
class Commands:
    """`stop_by_s`: when the engine must stop at the latest; None until a Shutdown came."""

    table: ModelTable
    loads: Loads
    round_robin: RoundRobin
    mask_sources: MaskSources | None = None
    stop_by_s: float | None = None
    _arrivals: int = 0
    _opening: dict[int, _Opening] = field(default_factory=dict)  # by request

    @property
    def num_opening(self) -> int:
        """Requests whose mask source is being made."""
        return len(self._opening)

    def apply(self, command: Command, now: float) -> None:
        match command:
            case Add():
                self._add(command, now)
            case Abort(request_ids=ids):
                self._abort(frozenset(ids), now)
            case Load():
                self.loads.load(command, now)
            case Unload(model_id=model_id):
                self.loads.unload(model_id, now)
                if self.table.find(model_id) is None:
                    self.round_robin.forget(model_id)
            case Resize():
                self.table.resize(command, now)
            case Shutdown(grace_s=grace_s):
                self.stop_by_s = now + grace_s

    def poll(self, now: float) -> None:
        """Queue the requests whose mask source is made, and end those whose model is gone."""
        if not self._opening:
            return
        for request_id, opening in list(self._opening.items()):
            add = opening.add
            if self.table.find(add.model_id) != (opening.model, opening.adapter):
                del self._opening[request_id]
                self.table.emit_rows(add.model_id, [RowTokens(request_id, (), FinishReason.ABORTED)])
            elif opening.job is None or opening.job.ready():
                del self._opening[request_id]
                try:
                    source = None if opening.job is None else opening.job.result()
                except RepertoryError as error:
                    self.table.refuse(request_id, add.model_id, error.code, error.detail)
                else:
                    self._queue(opening, source, now)

    def close(self) -> None:
        """Refuse the requests whose mask source is still being made, because the engine ends."""
        for opening in self._opening.values():
            self.table.refuse(opening.add.request_id, opening.add.model_id, "UNAVAILABLE", "the engine has shut down")
        self._opening.clear()

    def _add(self, add: Add, now: float) -> None:
        found = self.table.find(add.model_id)
        if self.stop_by_s is not None:
            self.table.refuse(add.request_id, add.model_id, "UNAVAILABLE", "the engine is shutting down")
            return
        if found is None:
            self.table.refuse(add.request_id, add.model_id, "NOT_FOUND", "it is not loaded here")
            return
        model, adapter = found
        waiting = len(model.scheduler.waiting)
        if self._opening:
            waiting += sum(opening.model is model for opening in self._opening.values())
        if waiting >= model.max_waiting:
            text = f"{waiting} requests wait already, the limit is {model.max_waiting}"
            hint_s = first_end_s(self.table.models.values(), model)
            self.table.refuse(add.request_id, add.model_id, "RESOURCE_EXHAUSTED", text, hint_s)
            return
        arrival = self._arrivals
        self._arrivals += 1
        grammar = add.request.grammar
        if grammar is None:
            self._queue(_Opening(add, model, adapter, arrival, now, None), None, now)
        elif self.mask_sources is None:
            text = "this engine cannot constrain the output to a grammar; send the request without one"
            self.table.refuse(add.request_id, add.model_id, NotSupported.code, text)
        else:
            model.touch(now)
            job = self.mask_sources.open(model.request.checkpoint, model.facts, grammar)
            self._opening[add.request_id] = _Opening(add, model, adapter, arrival, now, job)

    def _queue(self, opening: _Opening, source: MaskSource | None, now: float) -> None:
        add, model, adapter = opening.add, opening.model, opening.adapter
        if add.request.bad_words:
            source = BadWords(add.request.bad_words, source)
        if add.request.reasoning_budget is not None:
            source = ReasoningLimit(add.request.reasoning_budget, source)
        most = (model if adapter is None else adapter).facts.max_model_len
        use = None if adapter is None else adapter.use
        sequence = from_add(add, opening.arrival, opening.arrived_s, most, source, use)
        if not 0 < sequence.prompt_len <= most:
            text = f"a prompt of {sequence.prompt_len} tokens; it must have between 1 and {most}"
            self.table.refuse(add.request_id, add.model_id, "INVALID_ARGUMENT", text)
            return
        if add.request.pooling and add.request.stop.max_tokens:
            text = f"a request for a vector generates nothing: max_tokens must be 0, got {add.request.stop.max_tokens}"
            self.table.refuse(add.request_id, add.model_id, "INVALID_ARGUMENT", text)
            return
        model.touch(now)
        self.table.uses.add(model.model_id)
        if adapter is not None:
            adapter.touch(now)
        wants_pass = add.request.pooling or add.request.logprobs.prompt is not None
        if sequence.max_output_tokens == 0 and not wants_pass:
            reason = FinishReason.LENGTH if add.request.stop.max_tokens == 0 else FinishReason.CONTEXT
            self.table.emit_rows(add.model_id, [RowTokens(add.request_id, (), reason, cached_tokens=0)])
            return
        model.scheduler.add(sequence)

    def _abort(self, request_ids: frozenset[int], now: float) -> None:
        for request_id in request_ids & self._opening.keys():
            model_id = self._opening.pop(request_id).add.model_id
            self.table.emit_rows(model_id, [RowTokens(request_id, (), FinishReason.ABORTED)])
        for model in self.table.models.values():
            found = [s for s in map(model.scheduler.find, request_ids) if s is not None]
            if found:
                self.table.end(model, found, FinishReason.ABORTED, now)
