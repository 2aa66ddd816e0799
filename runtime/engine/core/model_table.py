"""The loaded models of an engine, with the pools of slabs and rows that they share.

Registers and unregisters models so that no slab or row stays allocated, and emits what ends a request outside of a step.
"""

from collections.abc import Callable, Iterable

import msgspec

from common.decayed_uses import DecayedUses
from runtime.checkpoint.device_fit import DeviceBudget, ModelLayout, fit_device
from runtime.config.schema import EngineConfig
from runtime.engine.core.end_times import busy_s
from runtime.engine.core.executor import KvOperations, OperationExecutor
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.residency_manager import ResidencyManager
from runtime.engine.interfaces import Backend, Drafter, LoadResult, MaskSources
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import CloseRow, DropHost
from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.row_pool import ModelRows, RowPool
from runtime.engine.scheduler.scheduler import Scheduler
from runtime.engine.scheduler.sequence import Sequence
from runtime.errors import ModelTooLarge
from runtime.ipc.messages import EngineStats, Event, Load, RowTokens, Tokens
from runtime.types import FinishReason

_CPU_COST_SCALE = 100.0  # beside a GPU, to within an order of magnitude


class ModelTable:
    def __init__(
        self,
        config: EngineConfig,
        backend: Backend,
        executor: OperationExecutor,
        emit: Callable[[Event], None],
        drafter: Drafter | None = None,
        mask_sources: MaskSources | None = None,
    ) -> None:
        self._drafter = drafter
        self._mask_sources = mask_sources
        self.config = config
        self.backend = backend
        self.executor = executor
        self.emit = emit
        self.slabs = SlabPool(backend.total_slabs)
        self.rows = RowPool(min(config.max_rows, backend.max_rows, config.max_batch_tokens))
        self.models: dict[str, LoadedModel] = {}
        self.uses = DecayedUses()
        self.resident = ResidencyManager(self.slabs, self.models, executor.enqueue, self.keep_on_host)
        self._num_registrations = 0

    @property
    def num_changes(self) -> int:
        """Grows whenever a model is registered, unregistered, or changes its tier."""
        return self._num_registrations + self.resident.num_changes

    def check_fits(self, request: Load, weight_bytes: int) -> None:
        """Raise ModelTooLarge if weights of `weight_bytes` exceed the whole device budget."""
        budget = self.slabs.total * self.backend.slab_bytes
        if weight_bytes > budget:
            raise ModelTooLarge(
                f"its weights of {weight_bytes} bytes exceed the device budget of {budget} bytes",
                model=request.model_id,
                limit=budget,
                value=weight_bytes,
            )

    def register(self, request: Load, loaded: LoadResult, now: float) -> LoadedModel:
        """Add a model that was loaded. Raises ModelTooLarge if its weights and the smallest useful KV cache exceed the device budget."""
        memory, facts = loaded.memory, loaded.runner.facts
        geometry = memory.kv
        budget = DeviceBudget(self.slabs.total, self.backend.slab_bytes)
        layout = ModelLayout(memory.weight_slabs, geometry.blocks_per_slab, geometry.block_tokens, geometry.max_slabs)
        fit = fit_device(budget, layout, facts.max_model_len)
        if fit.refusal:
            raise ModelTooLarge(fit.refusal, model=request.model_id, limit=budget.size_bytes)
        facts = msgspec.structs.replace(facts, max_model_len=fit.max_model_len, wanted_model_len=facts.max_model_len)
        model_id, enqueue = request.model_id, self.executor.enqueue
        cache = PrefixCache(BlockPool(geometry, self.slabs, f"{model_id}/kv", KvOperations(model_id, enqueue)))
        rows = ModelRows(self.rows, lambda row: enqueue(CloseRow(model_id, row)))
        model = LoadedModel(
            request,
            facts,
            memory,
            cache,
            Scheduler(facts.eos_token_ids, cache, rows, self._drafter),
            CostModel(slowness=_CPU_COST_SCALE if self.backend.device == "cpu" else 1.0),
            min(request.max_waiting, self.config.max_waiting),
            now,
            uses=self.uses,
        )
        self.models[model_id] = model
        self._num_registrations += 1
        return model

    def unregister(
        self, model: LoadedModel, reason: FinishReason, now: float, code: str | None = None, error: str | None = None
    ) -> None:
        """Remove a model: end its requests for `reason` and release all that it holds. None of its steps may be in flight."""
        self.end(model, model.scheduler.sequences(), reason, now, code, error)
        model.cache.forget()
        self.resident.evict(model)
        self.executor.unload(model.model_id)
        del self.models[model.model_id]
        self.uses.forget(model.model_id)
        self._num_registrations += 1
        if self._mask_sources is not None:
            self._mask_sources.retain({other.request.checkpoint.model_dir for other in self.models.values()})

    def end(
        self,
        model: LoadedModel,
        sequences: Iterable[Sequence],
        reason: FinishReason,
        now: float,
        code: str | None = None,
        error: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """End sequences for a reason outside of their text, and emit it."""
        rows = []
        for sequence in sequences:
            model.scheduler.end(sequence, now)
            rows.append(
                RowTokens(sequence.request_id, (), reason, error_code=code, error=error, retry_after_s=retry_after_s)
            )
        self.emit_rows(model.model_id, rows)

    def fail_rows(self, model: LoadedModel, sequences: Iterable[Sequence], error: str) -> None:
        """Emit the error of sequences that ended with a step that failed."""
        rows = [RowTokens(s.request_id, (), FinishReason.ERROR, error_code="INTERNAL", error=error) for s in sequences]
        self.emit_rows(model.model_id, rows)

    def refuse(self, request_id: int, model_id: str, code: str, error: str, retry_after_s: float | None = None) -> None:
        row = RowTokens(request_id, (), FinishReason.ERROR, error_code=code, error=error, retry_after_s=retry_after_s)
        self.emit_rows(model_id, [row])

    def emit_rows(self, model_id: str, rows: list[RowTokens]) -> None:
        if rows:
            self.emit(Tokens(model_id, tuple(rows)))

    def make_host_room(self, size_bytes: int) -> None:
        """Drop host copies, the least used first, until a model of this size fits in the host tier."""
        if self.backend.host_total_bytes:
            self._drop_host_copies(size_bytes, self.models.values())

    def keep_on_host(self, model: LoadedModel) -> None:
        """Make room in the host tier for a model that returns from disk, if models that are used less hold enough of it."""
        size_bytes = model.memory.weight_bytes
        if not self.backend.host_total_bytes:
            return
        less_used = [other for other in self.models.values() if other.use < model.use]
        droppable = sum(other.memory.host_bytes() for other in less_used if not other.swapping)
        if self.backend.host_free_bytes() + droppable >= size_bytes + self._grammar_bytes:
            self._drop_host_copies(size_bytes, less_used)

    def _drop_host_copies(self, size_bytes: int, models: Iterable[LoadedModel]) -> None:
        for model in sorted(models, key=lambda m: (m.scheduler.running > 0, m.use, m.last_used_s)):
            if self.backend.host_free_bytes() >= size_bytes + self._grammar_bytes:
                return
            if model.memory.host_bytes() and not model.swapping:
                self.executor.enqueue(DropHost(model.model_id))
                self.executor.flush()  # the next look at the free bytes must include these

    @property
    def _grammar_bytes(self) -> int:
        """Host memory of the tokenizers that grammars need."""
        return 0 if self._mask_sources is None else self._mask_sources.host_bytes

    def stats(self) -> EngineStats:
        slab_bytes = self.backend.slab_bytes
        models = self.models.values()
        kv_blocks, busy = self.resident.kv_blocks_of_all(), busy_s(models)
        return EngineStats(
            device_budget_bytes=self.slabs.total * slab_bytes,
            device_used_bytes=(self.slabs.total - self.slabs.free) * slab_bytes,
            host_budget_bytes=self.backend.host_total_bytes,
            host_used_bytes=self.backend.host_total_bytes - self.backend.host_free_bytes() + self._grammar_bytes,
            stranded_bytes=sum(model.stranded_bytes() for model in models),
            models=tuple(model.stats(slab_bytes, kv_blocks[model.model_id], busy[model.model_id]) for model in models),
        )

    def check(self) -> None:
        """Raise AssertionError unless every slab and row is free or has an owner."""
        self.slabs.check()
        self.rows.check()
        for model in self.models.values():
            model.scheduler.check()
            if self.slabs.lent(model.weights_owner) != len(model.weight_slabs or ()):
                raise AssertionError(f"{model.model_id}: weights hold {self.slabs.lent(model.weights_owner)} slabs")
        running = sum(model.scheduler.running for model in self.models.values())
        if running != self.rows.total - self.rows.free:
            raise AssertionError(f"{running} rows run, {self.rows.total - self.rows.free} are taken")
