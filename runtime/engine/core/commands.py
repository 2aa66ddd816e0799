"""Applies the commands of the front: requests, aborts and shutdown. Loads and unloads are in loads.py."""

from dataclasses import dataclass

from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.loads import Loads
from runtime.engine.core.model_table import ModelTable
from runtime.engine.interfaces import MaskSource, MaskSources
from runtime.engine.scheduler.model_round_robin import RoundRobin
from runtime.engine.scheduler.sequence import from_add
from runtime.errors import NotSupported, RepertoryError
from runtime.ipc.messages import Abort, Add, Command, Load, RowTokens, Shutdown, Unload
from runtime.types import FinishReason


@dataclass(slots=True)
class Commands:
    """`stop_by_s`: when the engine must stop at the latest; None until a Shutdown came."""

    table: ModelTable
    loads: Loads
    round_robin: RoundRobin
    mask_sources: MaskSources | None = None
    stop_by_s: float | None = None
    _arrivals: int = 0

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
                if model_id not in self.table.models:
                    self.round_robin.forget(model_id)
            case Shutdown(grace_s=grace_s):
                self.stop_by_s = now + grace_s

    def _add(self, add: Add, now: float) -> None:
        model = self.table.models.get(add.model_id)
        if self.stop_by_s is not None:
            self.table.refuse(add.request_id, add.model_id, "UNAVAILABLE", "the engine is shutting down")
            return
        if model is None:
            self.table.refuse(add.request_id, add.model_id, "NOT_FOUND", "it is not loaded here")
            return
        waiting = len(model.scheduler.waiting)
        if waiting >= model.max_waiting:
            text = f"{waiting} requests wait already, the limit is {model.max_waiting}"
            self.table.refuse(add.request_id, add.model_id, "RESOURCE_EXHAUSTED", text)
            return
        most = model.facts.max_model_len
        try:
            mask_source = self._mask_source(add, model)
        except RepertoryError as error:
            self.table.refuse(add.request_id, add.model_id, error.code, error.detail)
            return
        sequence = from_add(add, self._arrivals, now, most, mask_source)
        self._arrivals += 1
        if not 0 < sequence.prompt_len <= most:
            text = f"a prompt of {sequence.prompt_len} tokens; it must have between 1 and {most}"
            self.table.refuse(add.request_id, add.model_id, "INVALID_ARGUMENT", text)
            return
        model.touch(now)
        wants_pass = add.request.pooling or add.request.logprobs.prompt is not None
        if sequence.max_output_tokens == 0 and not wants_pass:
            reason = FinishReason.LENGTH if add.request.stop.max_tokens == 0 else FinishReason.CONTEXT
            self.table.emit_rows(add.model_id, [RowTokens(add.request_id, (), reason, cached_tokens=0)])
            return
        model.scheduler.add(sequence)

    def _mask_source(self, add: Add, model: LoadedModel) -> MaskSource | None:
        if add.request.grammar is None:
            return None
        if self.mask_sources is None:
            raise NotSupported("this engine cannot constrain the output to a grammar; send the request without one")
        return self.mask_sources.open(model.request.checkpoint, add.request)

    def _abort(self, request_ids: frozenset[int], now: float) -> None:
        for model in self.table.models.values():
            found = [s for s in map(model.scheduler.find, request_ids) if s is not None]
            if found:
                self.table.end(model, found, FinishReason.ABORTED, now)
