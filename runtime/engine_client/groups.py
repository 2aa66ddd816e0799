"""Runs the engines of a runtime, one per group of devices, and dispatches to them by model.

A model is in one group. When a group's engine dies, the models of the other groups keep running.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from common.changes import Changes
from common.model_state import ModelFigures
from runtime.config.schema import EngineConfig
from runtime.engine_client.client import CommandBuilder, EngineClient
from runtime.engine_client.group_plan import device_names
from runtime.engine_client.lifecycle import EngineListener, EngineState
from runtime.engine_client.placement import GroupRoom, ResidentBytes, Wanted, order_groups, refusal_of
from runtime.engine_client.process import engine_command
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.errors import LoadFailed, ModelTooLarge, Unavailable
from runtime.ipc.messages import EngineStats, Hello, Load, RowTokens
from runtime.types import GenerationRequest, ModelFacts


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """A group as its engine reports it. Sizes in `hello` and `stats` are those of each device, but models' figures are those of all together."""

    devices: tuple[str, ...]
    hello: Hello
    stats: EngineStats | None
    state: EngineState
    models: frozenset[str]

    @property
    def size(self) -> int:
        return len(self.devices)

    def residents(self, last_used_s: Mapping[str, float], leave_out: str = "") -> tuple[ResidentBytes, ...]:
        """Return the models in device memory, with their bytes on each device."""
        return tuple(
            ResidentBytes(
                model.model_id,
                model.device_bytes // self.size,
                model.running + model.waiting > 0,
                last_used_s.get(model.model_id, 0.0),
            )
            for model in (self.stats.models if self.stats is not None else ())
            if model.device_bytes and model.model_id != leave_out
        )


class EngineGroups:
    """Supervises the engines of all groups. Call `start` first and `stop` last, all on one event loop. `configs`: one per group."""

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        *,
        command: CommandBuilder = engine_command,
        restart: RestartPolicy | None = None,
    ) -> None:
        self.changes = Changes()
        self.sizes = tuple(config.tensor_parallel for config in configs)
        self._clients = tuple(
            EngineClient(
                config,
                command=command,
                restart=restart,
                changes=self.changes,
                label="the engine" if len(configs) == 1 else f"the engine of group {number}",
            )
            for number, config in enumerate(configs)
        )
        self._awaited: dict[str, tuple[EngineClient, int]] = {}  # bytes in all of models whose loads are in progress

    def listen(self, listener: EngineListener) -> None:
        for client in self._clients:
            client.listen(listener)

    def start(self) -> None:
        """Start all engines and their supervision."""
        for client in self._clients:
            client.start()

    async def stop(self, grace_s: float) -> None:
        """Let running sequences end within `grace_s`, then stop all engines. Idempotent."""
        await asyncio.gather(*(client.stop(grace_s) for client in self._clients))

    # State

    @property
    def state(self) -> EngineState:
        """STOPPED once an engine is given up, STARTING until all have been ready, and READY while one is."""
        states = {client.state for client in self._clients}
        if EngineState.STOPPED in states:
            return EngineState.STOPPED
        if not self.has_started:
            return EngineState.STARTING
        return EngineState.READY if EngineState.READY in states else EngineState.RESTARTING

    @property
    def has_started(self) -> bool:
        """Whether every engine has been ready once."""
        return all(client.hello is not None for client in self._clients)

    @property
    def restarts(self) -> int:
        return sum(client.restarts for client in self._clients)

    @property
    def failure(self) -> str:
        return next((client.failure for client in self._clients if client.state is EngineState.STOPPED), "")

    @property
    def device(self) -> str:
        """The first device, such as cpu or cuda:0. All are of one kind."""
        hello = self._clients[0].hello
        return hello.device if hello is not None else ""

    @property
    def groups(self) -> tuple[EngineGroup, ...]:
        """The groups whose engines have been ready."""
        found, num_before = [], 0
        for client, size in zip(self._clients, self.sizes, strict=True):
            if client.hello is not None:
                names = device_names(client.hello.device, size, num_before, is_only=len(self._clients) == 1)
                stats = _in_all(client.stats, size) if client.stats is not None else None
                found.append(EngineGroup(names, client.hello, stats, client.state, frozenset(client.models)))
            num_before += size
        return tuple(found)

    def figures(self) -> dict[str, ModelFigures]:
        """Return the figures of all models by id, those of all devices together."""
        return {model.model_id: model for group in self.groups if group.stats for model in group.stats.models}

    def check(self) -> None:
        """Raise Unavailable unless an engine is ready."""
        if self.state is not EngineState.READY:
            for client in self._clients:
                client.check()

    async def wait_ready(self, model_id: str = "") -> None:
        """Wait until an engine is ready, the one of the model if it is in a group. Raises Unavailable once restarting has been given up."""
        while self.state is not EngineState.READY:
            if self.state is EngineState.STOPPED:
                raise Unavailable(self.failure or "the engine is stopped")
            await self.changes.wait()
        client = self._find(model_id)
        if client is not None:
            await client.wait_ready()

    # Models

    def check_offers(self, wanted: Wanted, name: str) -> None:
        """Raise LoadFailed unless a group has the size that the model `name` asks for."""
        if refusal := refusal_of(self.sizes, wanted):
            raise LoadFailed(refusal, model=name)

    def order(
        self, weight_bytes: int, wanted: Wanted, last_used_s: Mapping[str, float], leave_out: str = ""
    ) -> list[EngineGroup]:
        """Return the groups to try for a model, the best first. Call it once all engines have been ready."""
        groups = self.groups
        rooms = [self._room(number, group, last_used_s, leave_out) for number, group in enumerate(groups)]
        return [groups[number] for number in order_groups(rooms, weight_bytes, wanted)]

    async def load(self, request: Load, wanted: Wanted, last_used_s: Mapping[str, float]) -> ModelFacts:
        """Admit a model and return when it is admitted. A caller that stops waiting must call `unload`. Raises the engine's error, or Unavailable.

        `wanted`: the number of devices that share it; with "auto", a group in which it does not fit is followed by a larger one.
        """
        tried: list[tuple[int, int]] = []
        refusal: ModelTooLarge | None = None
        for number in self._candidates(request, wanted, last_used_s):
            client, size = self._clients[number], self.sizes[number]
            budget_bytes = client.hello.device_budget_bytes if client.hello is not None else 0
            if any(size == other and budget_bytes <= most for other, most in tried):
                continue
            self._awaited[request.model_id] = client, request.checkpoint.weight_bytes
            try:
                return msgspec.structs.replace(await client.load(request), num_devices=size)
            except ModelTooLarge as error:
                refusal = error
                tried.append((size, budget_bytes))
            finally:
                del self._awaited[request.model_id]
        raise refusal or LoadFailed(f"its base {request.adapter_of} is not loaded here", model=request.model_id)

    async def unload(self, model_id: str) -> None:
        """Unload a model and return when its memory is free, at once if no engine has it."""
        client = self._find(model_id)
        if client is not None:
            await client.unload(model_id)

    def running(self, model_id: str) -> int:
        """Return the number of the model's open sequences, queued ones included."""
        client = self._find(model_id)
        return client.running(model_id) if client is not None else 0

    async def drain(self, model_id: str, timeout_s: float) -> bool:
        """Wait until no sequence of the model is open. Return False after `timeout_s`."""
        client = self._find(model_id)
        return await client.drain(model_id, timeout_s) if client is not None else True

    def generate(self, model_id: str, request: GenerationRequest) -> AsyncIterator[RowTokens]:
        """See runtime.interfaces.TokenEngine."""
        client = self._find(model_id) or self._clients[0]  # Any engine refuses a model that it does not have.
        return client.generate(model_id, request)

    def _find(self, model_id: str) -> EngineClient | None:
        return next((client for client in self._clients if model_id in client.models), None)

    def _candidates(self, request: Load, wanted: Wanted, last_used_s: Mapping[str, float]) -> list[int]:
        """Return the numbers of the groups to try. An adapter belongs to its base's group, and a model that returns to its own."""
        holder = self._find(request.adapter_of or request.model_id)
        held = [number for number, client in enumerate(self._clients) if client is holder]
        if request.adapter_of:
            return held
        self.check_offers(wanted, request.model_id)
        rooms = [self._room(number, group, last_used_s) for number, group in enumerate(self.groups)]
        ordered = order_groups(rooms, request.checkpoint.weight_bytes, wanted)
        return [
            *(number for number in held if number in ordered),
            *(number for number in ordered if number not in held),
        ]

    def _room(
        self, number: int, group: EngineGroup, last_used_s: Mapping[str, float], leave_out: str = ""
    ) -> GroupRoom:
        used_bytes = group.stats.device_used_bytes if group.stats is not None else 0
        client = self._clients[number]
        awaited_bytes = sum(bytes_ for owner, bytes_ in self._awaited.values() if owner is client) // group.size
        budget_bytes = group.hello.device_budget_bytes
        residents = group.residents(last_used_s, leave_out)
        return GroupRoom(group.size, budget_bytes, budget_bytes - used_bytes - awaited_bytes, residents)


def _in_all(stats: EngineStats, size: int) -> EngineStats:
    """Return an engine's report with its models' figures multiplied to those of all its devices."""
    if size == 1:
        return stats
    models = tuple(
        msgspec.structs.replace(
            model,
            weight_bytes=model.weight_bytes * size,
            device_bytes=model.device_bytes * size,
            kv_bytes=model.kv_bytes * size,
            kv_host_bytes=model.kv_host_bytes * size,
        )
        for model in stats.models
    )
    return msgspec.structs.replace(stats, models=models)
