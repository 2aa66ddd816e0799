"""The loaded models of an engine, with the pools of slabs and rows that they share.

Registers and unregisters models so that no slab or row stays allocated, and emits what ends a request outside of a step.
"""

import logging
from collections.abc import Callable, Iterable

import msgspec

from common.decayed_uses import DecayedUses
from runtime.checkpoint.device_fit import DeviceBudget, ModelLayout, fit_adapter, fit_device
from runtime.config.schema import EngineConfig
from runtime.engine.core.adapter_manager import AdapterManager
from runtime.engine.core.device_share import DeviceShare
from runtime.engine.core.end_times import busy_s
from runtime.engine.core.executor import KvOperations, OperationExecutor
from runtime.engine.core.host_kv import HostKv
from runtime.engine.core.loaded_adapter import LoadedAdapter
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.residency_manager import ResidencyManager
from runtime.engine.core.slab_exchange import SlabExchange
from runtime.engine.grammar.interfaces import MaskSources
from runtime.engine.interfaces import AdapterBank, AdapterResult, Backend, Drafter, LoadResult
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.link_rate import LinkRate
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import CloseRow, DropHost
from runtime.engine.scheduler.adapter_use import AdapterUse
from runtime.engine.scheduler.cost_model import CostModel
from runtime.engine.scheduler.row_pool import ModelRows, RowPool
from runtime.engine.scheduler.scheduler import Scheduler
from runtime.engine.scheduler.sequence import Sequence
from runtime.errors import LoadFailed as LoadFailedError
from runtime.errors import ModelTooLarge
from runtime.ipc.messages import EngineStats, Event, GrammarFigures, Load, LoadFailed, Resize, RowTokens, Tokens
from runtime.types import FinishReason

_LOG = logging.getLogger(__name__)

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
        self.slabs = SlabPool(backend.total_slabs, 0 if config.shares_device else None)
        self.share = DeviceShare(self.slabs)
        self.rows = RowPool(min(config.max_rows, backend.max_rows, config.max_batch_tokens))
        self.models: dict[str, LoadedModel] = {}
        self.uses = DecayedUses()
        self.link = LinkRate()
        self._banks: dict[str, AdapterBank] = {}
        self.adapters = AdapterManager(self.slabs, backend.slab_bytes, executor.enqueue)
        self.resident = ResidencyManager(
            self.slabs, self.models, executor.enqueue, self.adapters, self.share, make_host_room=self.keep_on_host
        )
        self.exchange = SlabExchange(
            self.share, self.slabs, self.models, self.resident, self.adapters, executor.enqueue
        )
        self.host_kv = HostKv(backend.host_kv_bytes // backend.slab_bytes, self._host_has_chunk, executor.enqueue)
        self._num_registrations = 0
        self._num_masks = 0
        self._mask_seconds = 0.0

    @property
    def num_changes(self) -> int:
        """Grows whenever a model is registered, unregistered, or changes its tier."""
        return self._num_registrations + self.resident.num_changes + self.adapters.num_changes + self.share.num_changes

    def resize(self, command: Resize, now: float) -> None:
        """Change the number of slabs that this engine holds on each of its devices."""
        self.exchange.resize(command, now)
        slabs = self.slabs.uncommitted(command.num_slabs - self.slabs.committed)
        while slabs:
            error = self.executor.commit(slabs)
            if error is None:
                self.slabs.commit(slabs)
                return
            _LOG.warning("%d slabs of device memory could not be taken: %s", len(slabs), error)
            slabs = slabs[: len(slabs) // 2]

    def check_fits(self, request: Load, weight_bytes: int) -> None:
        """Raise ModelTooLarge if weights of `weight_bytes` exceed the whole budget of the devices that share them."""
        num_devices = self.config.tensor_parallel
        budget = self.slabs.total * self.backend.slab_bytes * num_devices
        if weight_bytes > budget:
            owner = "the device budget" if num_devices == 1 else f"the common budget of its {num_devices} devices"
            raise ModelTooLarge(
                f"its weights of {weight_bytes} bytes exceed {owner} of {budget} bytes",
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
        host_blocks = self.host_kv.open(model_id, geometry)
        blocks = BlockPool(geometry, self.slabs, f"{model_id}/kv", KvOperations(model_id, enqueue))
        cache = PrefixCache(blocks, host_blocks)
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
            link=self.link,
            host_blocks=host_blocks,
        )
        self.models[model_id] = model
        if loaded.adapters is not None:
            self._banks[model_id] = loaded.adapters
        self._num_registrations += 1
        return model

    def find(self, model_id: str) -> tuple[LoadedModel, LoadedAdapter | None] | None:
        """Return the model that runs the requests for a name: the model itself, or the base of an adapter with the adapter."""
        adapter = self.adapters.adapters.get(model_id)
        if adapter is not None:
            return adapter.base, adapter
        model = self.models.get(model_id)
        return None if model is None else (model, None)

    def check_base(self, request: Load) -> None:
        """Raise LoadFailed unless the base of an adapter is loaded."""
        if request.adapter_of not in self.models:
            raise LoadFailedError(f"its base {request.adapter_of} is not loaded here", model=request.model_id)

    def register_adapter(self, request: Load, loaded: AdapterResult, now: float) -> LoadedAdapter:
        """Add an adapter that was loaded.

        Raises LoadFailed if its base is gone, or ModelTooLarge if both and the smallest useful KV cache exceed the device budget.
        """
        base = self.models.get(request.adapter_of)
        if base is None:
            raise LoadFailedError(f"its base {request.adapter_of} was unloaded", model=request.model_id)
        geometry = base.memory.kv
        budget = DeviceBudget(self.slabs.total, self.backend.slab_bytes)
        layout = ModelLayout(base.memory.weight_slabs, geometry.blocks_per_slab, geometry.block_tokens)
        fit = fit_adapter(budget, loaded.memory.size_bytes, layout, base.facts.max_model_len)
        if fit.refusal:
            raise ModelTooLarge(fit.refusal, model=request.model_id, limit=budget.size_bytes)
        use = AdapterUse(request.model_id, loaded.memory.digest.encode())
        facts = msgspec.structs.replace(loaded.facts, max_model_len=fit.max_model_len)
        adapter = LoadedAdapter(request, facts, loaded.memory, base, use, now)
        self.adapters.add(adapter, self._banks[base.model_id])
        self.executor.expect_adapters(base.model_id)
        self._num_registrations += 1
        return adapter

    def unregister_adapter(
        self,
        adapter: LoadedAdapter,
        reason: FinishReason,
        now: float,
        code: str | None = None,
        error: str | None = None,
    ) -> None:
        """Remove an adapter: end its requests for `reason` and release its place. None of its base's steps may be in flight."""
        base = adapter.base
        self.end(base, [s for s in base.scheduler.sequences() if s.adapter is adapter.use], reason, now, code, error)
        self.adapters.remove(adapter)
        self.executor.unload(adapter.model_id)
        self._num_registrations += 1

    def unregister(
        self, model: LoadedModel, reason: FinishReason, now: float, code: str | None = None, error: str | None = None
    ) -> None:
        """Remove a model: end its requests for `reason` and release all that it holds. None of its steps may be in flight."""
        self.end(model, model.scheduler.sequences(), reason, now, code, error)
        for adapter in self.adapters.of(model):
            self.unregister_adapter(adapter, reason, now, code, error)
            self.emit(LoadFailed(adapter.model_id, "FAILED_PRECONDITION", f"its base {model.model_id} was unloaded"))
        self.adapters.forget_base(model)
        self._banks.pop(model.model_id, None)
        model.cache.forget()
        self.host_kv.close(model.model_id)
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
        """Drop saved KV, then host copies of weights, the least used first, until a model of this size fits in the host tier."""
        if self.backend.host_total_bytes:
            self._drop_host_copies(size_bytes, [*self.models.values(), *self.adapters.adapters.values()])

    def keep_on_host(self, model: LoadedModel) -> None:
        """Make room in the host tier for a model that returns from disk, if models that are used less hold enough of it."""
        size_bytes = model.memory.weight_bytes
        if not self.backend.host_total_bytes:
            return
        less_used = [other for other in self.models.values() if other.use < model.use]
        droppable = sum(other.memory.host_bytes() for other in less_used if not other.swapping)
        droppable += self.host_kv.num_chunks * self.backend.slab_bytes
        if self.backend.host_free_bytes() + droppable >= size_bytes + self._grammar_bytes:
            self._drop_host_copies(size_bytes, less_used)

    def _drop_host_copies(self, size_bytes: int, holders: Iterable[LoadedModel | LoadedAdapter]) -> None:
        def use(holder: LoadedModel | LoadedAdapter) -> tuple[bool, float, float]:
            """Return what orders holders: whether it runs, its decayed uses (an adapter has those of its base), and its last use."""
            if isinstance(holder, LoadedModel):
                return holder.scheduler.running > 0, holder.use, holder.last_used_s
            return holder.use.running > 0, holder.base.use, holder.last_used_s

        self.executor.flush()  # the free bytes must include what was saved
        while self.backend.host_free_bytes() < size_bytes + self._grammar_bytes and self.host_kv.drop_oldest():
            self.executor.flush()
        for model in sorted(holders, key=use):
            if self.backend.host_free_bytes() >= size_bytes + self._grammar_bytes:
                return
            if model.memory.host_bytes() and not model.swapping:
                self.executor.enqueue(DropHost(model.model_id))
                self.executor.flush()  # the next look at the free bytes must include these

    def _host_has_chunk(self) -> bool:
        """Whether the host tier has a free chunk for KV. During a load it has none: the weights come first. A CPU takes ordinary memory."""
        if not self.backend.host_total_bytes:
            return True
        self.executor.flush()  # the free bytes must include what was saved
        wanted = self.backend.slab_bytes + self._grammar_bytes
        return not self.executor.num_loading and self.backend.host_free_bytes() >= wanted

    @property
    def _grammar_bytes(self) -> int:
        """Host memory of the tokenizers that grammars need."""
        return 0 if self._mask_sources is None else self._mask_sources.host_bytes

    def count_masks(self, masks: int, seconds: float) -> None:
        """Count the masks of one step and the time that the engine thread computed them."""
        self._num_masks += masks
        self._mask_seconds += seconds

    def _grammar_figures(self) -> GrammarFigures:
        built = GrammarFigures() if self._mask_sources is None else self._mask_sources.figures
        return msgspec.structs.replace(built, masks_total=self._num_masks, mask_seconds_total=self._mask_seconds)

    def stats(self) -> EngineStats:
        slab_bytes = self.backend.slab_bytes
        models = self.models.values()
        kv_blocks, busy = self.resident.kv_blocks_of_all(), busy_s(models)
        return EngineStats(
            device_budget_bytes=self.slabs.total * slab_bytes,
            device_used_bytes=self.slabs.num_lent * slab_bytes,
            host_budget_bytes=self.backend.host_total_bytes,
            host_used_bytes=self.backend.host_total_bytes - self.backend.host_free_bytes() + self._grammar_bytes,
            stranded_bytes=sum(model.stranded_bytes() for model in models),
            models=(
                *(model.stats(slab_bytes, kv_blocks[model.model_id], busy[model.model_id]) for model in models),
                *(adapter.stats() for adapter in self.adapters.adapters.values()),
            ),
            grammars=self._grammar_figures(),
            share=self.share.figures(self.exchange.free_slabs, self.exchange.idle_slabs)
            if self.config.shares_device
            else None,
        )

    def check(self) -> None:
        """Raise AssertionError unless every slab and row is free or has an owner."""
        self.slabs.check()
        self.rows.check()
        self.adapters.check()
        self.host_kv.check()
        for model in self.models.values():
            model.scheduler.check()
            if self.slabs.lent(model.weights_owner) != len(model.weight_slabs or ()):
                raise AssertionError(f"{model.model_id}: weights hold {self.slabs.lent(model.weights_owner)} slabs")
        running = sum(model.scheduler.running for model in self.models.values())
        if running != self.rows.total - self.rows.free:
            raise AssertionError(f"{running} rows run, {self.rows.total - self.rows.free} are taken")
