"""repertory.RuntimeState: streams the state of the runtime's models and answers whether a model would fit.

The comments in proto/repertory/runtime.proto specify the methods.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc.aio
import msgspec

from common.model_key import Dtype
from common.model_state import CopyState, ModelFigures, ModelState, Tier
from runtime.api.grpc_errors import statuses
from runtime.checkpoint.device_fit import DeviceBudget, DeviceFit, ModelLayout, fit_adapter, fit_device, layout_of
from runtime.config.schema import RuntimeConfig
from runtime.engine_client.engine_group import EngineGroup, device_figures
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.placement import refusal_of, victims
from runtime.ipc.messages import Hello
from runtime.models.capacity import capacity_of
from runtime.models.manager import Models
from runtime.models.model_key import parse_model
from runtime.models.model_state import ModelView, Phase, Progress
from runtime.puller.cache import Cache
from runtime.puller.inspection import ModelInspector
from runtime.puller.sizing import DTYPE_BYTES, Needs
from runtime.types import ModelFacts
from wire.repertory import runtime_pb2 as pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateServicer, add_RuntimeStateServicer_to_server

SERVICE_NAME = "repertory.RuntimeState"
_SHORTEST_S = 0.2
_LONGEST_S = 2.0
_RATE_WINDOW_S = 3.0

_ENGINE = {
    EngineState.STARTING: pb.ENGINE_STARTING,
    EngineState.READY: pb.ENGINE_READY,
    EngineState.RESTARTING: pb.ENGINE_RESTARTING,
    EngineState.STOPPED: pb.ENGINE_STOPPED,
}
# the message has the schema's names; states and tiers are enums of its own
_SAME = tuple(name for name in ModelState.__struct_fields__ if name not in ("state", "tier"))


@dataclass(slots=True)
class TokenRate:
    """Tokens per second over the last few seconds, from a counter."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def update(self, now_s: float, total: int) -> float:
        if self.samples and total < self.samples[-1][1]:
            self.samples.clear()  # a restarted engine counts from zero
        self.samples.append((now_s, total))
        while len(self.samples) > 2 and now_s - self.samples[1][0] >= _RATE_WINDOW_S:
            del self.samples[0]
        first_s, first = self.samples[0]
        return (total - first) / (now_s - first_s) if now_s > first_s else 0.0


class RuntimeStateApi(RuntimeStateServicer):
    def __init__(
        self,
        config: RuntimeConfig,
        engine: EngineGroups,
        models: Models,
        fitter: ModelInspector,
        cache_budget_bytes: int,
        cache: Cache | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._models = models
        self._fitter = fitter
        self._cache_budget_bytes = cache_budget_bytes
        self._cache = cache
        self._stopping = False

    def stop(self) -> None:
        """End all watches, which would otherwise outlast the grace period."""
        self._stopping = True
        self._models.changes.notify()

    async def watch(
        self, request: pb.WatchRequest, context: "grpc.aio.ServicerContext[pb.WatchRequest, pb.RuntimeSnapshot]"
    ) -> AsyncIterator[pb.RuntimeSnapshot]:
        rates: dict[str, TokenRate] = {}
        while True:
            seen_models, seen_engine = self._models.changes.version, self._engine.changes.version
            yield self._snapshot(rates)
            await asyncio.sleep(_SHORTEST_S)
            if self._stopping or self._engine.state is EngineState.STOPPED:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the runtime is shutting down")
            waits = [
                asyncio.create_task(self._models.changes.wait(_LONGEST_S - _SHORTEST_S, since=seen_models)),
                asyncio.create_task(self._engine.changes.wait(_LONGEST_S - _SHORTEST_S, since=seen_engine)),
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def fit(
        self, request: pb.FitRequest, context: "grpc.aio.ServicerContext[pb.FitRequest, pb.FitResponse]"
    ) -> pb.FitResponse:
        async with statuses(context):
            source, settings = parse_model(request.model_path, request.model_key)
            await self._engine.wait_ready()
            base = self._loaded(settings.adapter_of) if settings.adapter_of is not None else None
            if base is not None and base.facts is not None:
                settings = msgspec.structs.replace(settings, dtype=cast("Dtype", base.facts.dtype))
            sizes = set(self._engine.sizes)
            look = await self._fitter.look(source, settings, self._engine.device, group_sizes=sizes)
        last_used_s = {view.model_id: view.last_used_s for view in self._models.views()}
        wanted = settings.tensor_parallel
        reason = refusal_of(self._engine.sizes, wanted)
        candidates = self._engine.order(
            look.needs.weight_bytes, "auto" if reason else wanted, last_used_s, request.model_id
        )
        if base is not None:
            candidates = [group for group in self._engine.groups if base.model_id in group.models] or candidates
        for group in candidates:
            needs = look.needs_on(group.size)
            fit = (
                self._fit_adapter(needs, base.facts if base is not None else None, group.hello)
                if settings.adapter_of is not None
                else self._fit(needs, group.hello)
            )
            if not fit.refusal:
                break
        kv_bytes = needs.kv_bytes_per_token * fit.max_model_len
        evicts: dict[str, None] = {}
        for room in group.rooms(last_used_s, leave_out=request.model_id):
            evicts |= dict.fromkeys(victims(needs.weight_bytes + kv_bytes, room.free_bytes, room.residents)[0])
        capacity = capacity_of(self._config.engine.oversubscribe, self._engine.groups, self._cache_budget_bytes)
        charge = capacity.charge(needs.weight_bytes, needs.kv_bytes_per_token, needs.max_model_len, group.size)
        reason = reason or fit.refusal
        if not reason and charge > capacity.capacity_bytes:
            reason = f"it counts {charge} bytes, more than the capacity of {capacity.capacity_bytes} bytes"
        runs = any(view.model_id == request.model_id and view.phase is Phase.LOADED for view in self._models.views())
        if not reason and not runs and not request.sizes_only:
            async with statuses(context):
                reason = await self._fitter.refusal(look, settings)
        return pb.FitResponse(
            weight_bytes=needs.weight_bytes,
            kv_bytes_per_token=needs.kv_bytes_per_token,
            min_kv_bytes=kv_bytes,
            workspace_bytes=needs.workspace_bytes,
            capacity_bytes=group.hello.device_budget_bytes,
            num_devices=group.size,
            fits=not reason,
            reason=reason,
            evicts=evicts,
            max_model_len=fit.max_model_len,
            wanted_model_len=needs.max_model_len,
            quantization=look.quantization.value,
            architecture=look.geometry.architecture,
            num_parameters=needs.num_parameters,
            exact=look.exact,
            unpacked_blocks=look.unpacking.blocks if look.unpacking is not None else "",
            stored_bytes=look.unpacking.stored_bytes if look.unpacking is not None else 0,
            nf4_weight_bytes=look.unpacking.nf4_weight_bytes if look.unpacking is not None else 0,
            kept_weight_bytes=look.unpacking.kept_weight_bytes if look.unpacking is not None else 0,
        )

    def _fit(self, needs: Needs, hello: Hello) -> DeviceFit:
        """Decide as the engine does when the model is loaded."""
        engine = self._config.engine
        kv_bytes = needs.kv_bytes_per_token
        if engine.kv_dtype == "fp8":
            kv_bytes //= DTYPE_BYTES[needs.dtype]
        budget = DeviceBudget(hello.device_budget_bytes // hello.slab_bytes, hello.slab_bytes)
        layout = layout_of(needs.weight_bytes, kv_bytes, engine.block_tokens, hello.slab_bytes)
        return fit_device(budget, layout, needs.max_model_len)

    def _fit_adapter(self, needs: Needs, base: ModelFacts | None, hello: Hello) -> DeviceFit:
        """Decide as the engine does when an adapter is loaded over `base`. None: the base is not loaded, so the adapter alone must fit."""
        budget = DeviceBudget(hello.device_budget_bytes // hello.slab_bytes, hello.slab_bytes)
        layout, wanted_tokens = ModelLayout(0, 0, 0), 0
        if base is not None:
            block_tokens = self._config.engine.block_tokens
            layout = layout_of(base.weight_bytes, base.kv_bytes_per_token, block_tokens, hello.slab_bytes)
            wanted_tokens = base.max_model_len
        return fit_adapter(budget, needs.weight_bytes, layout, wanted_tokens)

    def _loaded(self, name: str) -> ModelView | None:
        """Return a loaded model by its id or its name."""
        loaded = (view for view in self._models.views() if view.phase is Phase.LOADED)
        return next((view for view in loaded if name in (view.model_id, view.settings.display_name)), None)

    async def listFiles(
        self,
        request: pb.ListFilesRequest,
        context: "grpc.aio.ServicerContext[pb.ListFilesRequest, pb.ListFilesResponse]",
    ) -> pb.ListFilesResponse:
        entries = await asyncio.to_thread(self._cache.entries) if self._cache is not None else []
        files = [
            pb.CachedFiles(
                key=entry.key,
                kind=entry.kind,
                uri=entry.uri,
                size_bytes=entry.size_bytes,
                last_used_ms=round(entry.used_s * 1000),
                in_use=entry.in_use,
            )
            for entry in entries
        ]
        return pb.ListFilesResponse(files=files, budget_bytes=self._cache_budget_bytes)

    async def dropFiles(
        self,
        request: pb.DropFilesRequest,
        context: "grpc.aio.ServicerContext[pb.DropFilesRequest, pb.DropFilesResponse]",
    ) -> pb.DropFilesResponse:
        freed_bytes, num_in_use = 0, 0
        if self._cache is not None:
            freed_bytes, num_in_use = await asyncio.to_thread(self._cache.drop, frozenset(request.keys))
        return pb.DropFilesResponse(freed_bytes=freed_bytes, num_in_use=num_in_use)

    def _snapshot(self, rates: dict[str, TokenRate]) -> pb.RuntimeSnapshot:
        groups = self._engine.groups
        snapshot = pb.RuntimeSnapshot(
            engine_state=_ENGINE[self._engine.state],
            engine_restarts=self._engine.restarts,
            device_name=_device_name(groups),
        )
        reserve_bytes = self._config.engine.device_reserve_bytes
        for device in device_figures(groups):
            snapshot.device_budget_bytes += device.budget_bytes
            snapshot.device_used_bytes += device.used_bytes
            snapshot.device_reserve_bytes += reserve_bytes * device.num_engines if self._engine.device != "cpu" else 0
            snapshot.host_budget_bytes += device.host_budget_bytes
            snapshot.host_used_bytes += device.host_used_bytes
            snapshot.stranded_bytes += device.stranded_bytes
            snapshot.devices.append(
                pb.DeviceState(
                    name=device.name,
                    group=device.group,
                    budget_bytes=device.budget_bytes,
                    used_bytes=device.used_bytes,
                    engine_state=_ENGINE[device.state],
                )
            )
        if groups:
            snapshot.capacity_bytes = capacity_of(
                self._config.engine.oversubscribe, groups, self._cache_budget_bytes
            ).capacity_bytes
        by_id = self._engine.figures()
        devices_of = {model_id: ",".join(group.devices) for group in groups for model_id in group.models}
        now_s = time.monotonic()
        views = [view for view in self._models.views() if view.phase is not Phase.UNLOADING]
        for gone in set(rates) - {view.model_id for view in views}:
            del rates[gone]
        for view in views:
            figures = by_id.get(view.model_id)
            rate = rates.setdefault(view.model_id, TokenRate())
            tokens_per_s = rate.update(now_s, figures.generated_tokens_total) if figures is not None else 0.0
            state = state_of(view, figures, tokens_per_s, devices_of.get(view.model_id, ""))
            snapshot.models.append(to_message(state))
        return snapshot


def _device_name(groups: Sequence[EngineGroup]) -> str:
    """Return the names of all devices; equal ones once, with their number."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.hello.device_name] += 0 if group.is_shared else group.size
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items() if count)


def state_of(view: ModelView, figures: ModelFigures | None, tokens_per_s: float, devices: str = "") -> ModelState:
    """Join what the manager knows of a model with the engine's figures, which it has while the model is in the engine, and with its devices."""
    phase, facts = view.phase, view.facts
    progress = view.progress or Progress(phase)
    state = ModelState(
        model_id=view.model_id,
        state=CopyState.LOADING if phase is Phase.RETURNING else CopyState(phase.value),
        tier=Tier.REMOTE if phase in (Phase.PULLING, Phase.FAILED) else Tier.DISK,
        progress=min(progress.done_bytes / progress.total_bytes, 1.0) if progress.total_bytes else 0.0,
        progress_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        progress_text=progress.text,
        load_s=view.load_seconds,
        tokens_per_s=tokens_per_s,
        quantization=(facts.quantization if facts is not None else view.settings.quantize).value,
        error=view.error,
        devices=devices,
    )
    if facts is not None:
        state = msgspec.structs.replace(
            state,
            weight_bytes=facts.weight_bytes * facts.num_devices,
            dtype=facts.dtype,
            architecture=facts.architecture,
            path=facts.path,
            max_model_len=facts.max_model_len,
            wanted_model_len=facts.wanted_model_len,
        )
    return msgspec.structs.replace(state, **msgspec.structs.asdict(figures)) if figures is not None else state


def to_message(state: ModelState) -> pb.ModelState:
    return pb.ModelState(
        state=state.state.name,
        tier=state.tier.name,
        **{name: getattr(state, name) for name in _SAME},
    )


def add_state(server: grpc.aio.Server, api: RuntimeStateApi) -> str:
    add_RuntimeStateServicer_to_server(api, server)
    return SERVICE_NAME
