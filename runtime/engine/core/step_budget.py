"""What one plan of one model may use: tokens, rows and KV blocks, given who else wants them now.

Joins the cost model, the residency and the row pool into scheduler.Limits; plans nothing itself.
"""

from dataclasses import dataclass

from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.model_table import ModelTable
from runtime.engine.scheduler.scheduler import Limits

_LEAST_CHUNK = 64  # tokens of prefill that a step may have however short the quantum
_ALONE_ON_CPU_US = 500_000  # no step can be stopped: a full one would hold up for half a minute whoever comes or leaves
_GROWTH = 4  # there a step is at most so many times as large as any before: what it takes is a guess


@dataclass(slots=True)
class StepBudget:
    table: ModelTable

    def limits(self, model: LoadedModel, num_active: int, now: float) -> Limits:
        """Finds room for what the plan will want, as far as there is any."""
        scheduler, resident = model.scheduler, self.table.resident
        budget = self._token_budget(model, num_active)
        wanted = scheduler.blocks_wanted(budget)
        if wanted > model.cache.blocks.obtainable():
            resident.make_room(model, wanted, now)
        if model.draining or not len(scheduler.waiting):
            return Limits(budget, 0, 0)
        return Limits(budget, resident.kv_blocks(model), self._rows_to_admit(model, num_active))

    def handle_starvation(self, model: LoadedModel, now: float) -> None:
        """After an empty plan: others make way."""
        sequence = model.scheduler.starved()
        if sequence is None or (model.draining and not model.scheduler.running):
            return
        self.table.resident.yield_to(model, sequence, now)

    def _token_budget(self, model: LoadedModel, num_active: int) -> int:
        config = self.table.config
        on_cpu, alone = self.table.backend.device == "cpu", num_active == 1
        if alone and not on_cpu:
            return config.max_batch_tokens
        quantum_us = max(config.quantum_us, _ALONE_ON_CPU_US) if alone else config.quantum_us
        decoding, kv_tokens = model.scheduler.decoding()
        least = decoding + _LEAST_CHUNK
        tokens = model.cost.tokens_within(quantum_us, kv_tokens, least)
        if on_cpu:
            tokens = min(tokens, max(least, _GROWTH * model.cost.largest_tokens))
        return min(config.max_batch_tokens, tokens)

    def _rows_to_admit(self, model: LoadedModel, num_active: int) -> int:
        """All free rows, but no more than the model's share while another has none and waits for one."""
        free = self.table.rows.free
        models = self.table.models.values()
        if num_active > 1 and any(
            m.resident and not m.scheduler.running and m.has_work() for m in models if m is not model
        ):
            share = max(1, self.table.rows.total // num_active)
            return min(free, max(0, share - model.scheduler.running))
        return free
