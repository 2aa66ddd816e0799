"""Bounds one step of one model: tokens, rows and KV blocks, given what other models need now."""

from dataclasses import dataclass

from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.model_table import ModelTable
from runtime.engine.scheduler.kv_return import KvReturn
from runtime.engine.scheduler.limits import KvRoom, Limits

_LEAST_CHUNK = 64  # prefill tokens that every step may have, however short the quantum
_ALONE_ON_CPU_US = (
    500_000  # a step cannot be interrupted, and a full one would delay arrivals and aborts by half a minute
)
_GROWTH = 4  # on a CPU a step is at most this many times larger than any before, since its cost is extrapolated


@dataclass(slots=True)
class StepBudget:
    """Joins the cost model, residency and the row pool into scheduler.Limits."""

    table: ModelTable

    def limits(self, model: LoadedModel, num_active: int, now: float) -> Limits:
        """Return what the next plan may use, after reclaiming memory for what it will want."""
        scheduler, resident = model.scheduler, self.table.resident
        budget = self._token_budget(model, num_active)
        wanted = scheduler.blocks_wanted(budget)
        if wanted > model.cache.blocks.obtainable():
            resident.make_room(model, wanted, now)
        if model.draining or not len(scheduler.waiting):
            return Limits(budget, KvRoom(0, 0), 0)
        rows = self._rows_to_admit(model, num_active)
        return Limits(budget, resident.kv_room(model), rows, self._kv_return(model, budget, now))

    def _kv_return(self, model: LoadedModel, budget: int, now: float) -> KvReturn | None:
        if model.host_blocks is None:
            return None
        # On a CPU the cores that read weights compute, too, so that neither hides behind the other.
        weights_s = 0.0 if self.table.backend.device == "cpu" else model.arrives_in_s(now)
        copy_s_per_token = model.memory.kv.bytes_per_token / model.link.bytes_per_s
        return KvReturn(weights_s, copy_s_per_token, model.cost, budget)

    def handle_starvation(self, model: LoadedModel, now: float) -> None:
        """Reclaim room from later requests after an empty plan."""
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
        decoding, kv_tokens, adapters = model.scheduler.decoding()
        least = decoding + _LEAST_CHUNK
        tokens = model.cost.tokens_within(quantum_us, kv_tokens, least, adapters)
        if on_cpu:
            tokens = min(tokens, max(least, _GROWTH * model.cost.largest_tokens))
        return min(config.max_batch_tokens, tokens)

    def _rows_to_admit(self, model: LoadedModel, num_active: int) -> int:
        """Return all free rows, or at most the model's share while another model waits for its first row."""
        free = self.table.rows.free
        models = self.table.models.values()
        if num_active > 1 and any(
            m.resident and not m.scheduler.running and m.has_work() for m in models if m is not model
        ):
            share = max(1, self.table.rows.total // num_active)
            return min(free, max(0, share - model.scheduler.running))
        return free
