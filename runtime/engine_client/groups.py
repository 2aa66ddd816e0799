"""Runs the engines of a runtime, one per group of devices, and dispatches to them by model.

A model is in one group. When a group's engine dies, the models of the other groups keep running. Shared groups consist of devices that are groups of
their own. The engine of a shared group starts when a model needs it, and moves slabs with the engines of the same devices (slab_sharing).
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import msgspec

from common.changes import Changes
from common.model_state import ModelFigures
from runtime.config.schema import EngineConfig
from runtime.engine_client.client import CommandBuilder, EngineClient
from runtime.engine_client.engine_group import EngineGroup, in_all, neighbours_of
from runtime.engine_client.group_plan import SharedGroup, device_names
from runtime.engine_client.lifecycle import EngineListener, EngineState
from runtime.engine_client.placement import GroupRoom, Wanted, order_groups, refusal_of
from runtime.engine_client.process import engine_command
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.engine_client.slab_sharing import SlabSharing
from runtime.errors import LoadFailed, ModelTooLarge, Unavailable
from runtime.ipc.messages import Hello, Load, RowTokens
from runtime.types import GenerationRequest, ModelFacts

log = logging.getLogger(__name__)

_IDLE_S = 600.0


class EngineGroups:
    """Supervises the engines of all groups. Call `start` first and `stop` last, all on one event loop.

    Args:
        configs: one per group that starts at once, in the order of their devices.
        shared: further groups of the same devices.
        idle_s: how long the engine of a shared group runs without a model before it is ended.
    """

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        *,
        shared: Sequence[SharedGroup] = (),
        command: CommandBuilder = engine_command,
        restart: RestartPolicy | None = None,
        idle_s: float = _IDLE_S,
    ) -> None:
        self.changes = Changes()
        self._configs = [*configs, *(group.config for group in shared)]
        self.sizes = tuple(config.tensor_parallel for config in self._configs)
        self._command = command
        self._restart = restart
        self._num_homes = len(configs)
        self._shared = tuple(shared)
        homes = [sum(self.sizes[:number]) for number in range(len(configs))]
        self._first = (*homes, *(group.first for group in shared))  # number of each group's first device
        self._clients = [self._client(number) for number in range(len(self._configs))]
        self._bases: dict[str, str] = {}  # of loaded adapters
        self._sharing = SlabSharing(self.changes, self._bases)
        for number, config in enumerate(self._configs):
            if config.shares_device:
                is_home = number < self._num_homes
                overhead_bytes = 0 if is_home else shared[number - self._num_homes].overhead_bytes
                self._sharing.add(self._clients[number], self._devices(number), overhead_bytes, is_home=is_home)
        self._idle_s = idle_s
        self._starts: dict[int, asyncio.Task[None]] = {}  # of the engines of shared groups
        self._ends: dict[int, asyncio.Task[None]] = {}  # of those without a model, after a wait
        self._ending: set[int] = set()  # those whose wait is over
        self._loading: Counter[int] = Counter()  # loads in progress
        self._num_past_restarts = 0
        self._listener: EngineListener | None = None
        self._task: asyncio.Task[None] | None = None
        self._awaited: dict[str, tuple[EngineClient, int]] = {}  # bytes in all of models whose loads are in progress

    def _client(self, number: int) -> EngineClient:
        return EngineClient(
            self._configs[number],
            command=self._command,
            restart=self._restart,
            changes=self.changes,
            label="the engine" if len(self._configs) == 1 else f"the engine of group {number}",
        )

    def _devices(self, number: int) -> range:
        return range(self._first[number], self._first[number] + self.sizes[number])

    def listen(self, listener: EngineListener) -> None:
        self._listener = listener
        for client in self._clients:
            client.listen(listener)

    def start(self) -> None:
        """Start the engines of all groups but the shared ones, and their supervision."""
        for client in self._homes:
            client.start()
        if self._num_homes < len(self._clients):
            self._task = asyncio.create_task(self._sharing.run(), name="slab sharing")

    async def stop(self, grace_s: float) -> None:
        """Let running sequences end within `grace_s`, then stop all engines. Idempotent."""
        for task in (self._task, *self._starts.values(), *self._ends.values()):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(client.stop(grace_s) for client in self._clients))

    # State

    @property
    def _homes(self) -> list[EngineClient]:
        """The engines that start with the runtime."""
        return self._clients[: self._num_homes]

    @property
    def _counted(self) -> list[EngineClient]:
        shared = (number for number in range(self._num_homes, len(self._clients)) if number not in self._ending)
        return [*self._homes, *(self._clients[number] for number in shared if self._clients[number].hello is not None)]

    @property
    def state(self) -> EngineState:
        """STOPPED once an engine is given up, STARTING until all have been ready, and READY while one is.

        An engine of a shared group counts once it has been ready.
        """
        states = {client.state for client in self._counted}
        if EngineState.STOPPED in states:
            return EngineState.STOPPED
        if not self.has_started:
            return EngineState.STARTING
        return EngineState.READY if EngineState.READY in states else EngineState.RESTARTING

    @property
    def has_started(self) -> bool:
        """Whether every engine has been ready once."""
        return all(client.hello is not None for client in self._homes)

    @property
    def restarts(self) -> int:
        return self._num_past_restarts + sum(client.restarts for client in self._clients)

    @property
    def failure(self) -> str:
        return next((client.failure for client in self._counted if client.state is EngineState.STOPPED), "")

    @property
    def device(self) -> str:
        """The first device, such as cpu or cuda:0. All are of one kind."""
        hello = self._clients[0].hello
        return hello.device if hello is not None else ""

    @property
    def groups(self) -> tuple[EngineGroup, ...]:
        """The groups whose engines have been ready, and the shared groups once all others have been."""
        found: list[EngineGroup] = []
        for number, (client, size) in enumerate(zip(self._homes, self.sizes, strict=False)):
            if client.hello is not None:
                is_only = len(self._clients) == 1
                names = device_names(client.hello.device, size, self._first[number], is_only=is_only)
                found.append(self._group(number, names, self._left(number, client.hello)))
        if not self.has_started:
            return tuple(found)
        all_names = [name for group in found for name in group.devices]
        for number in range(self._num_homes, len(self._clients)):
            names = tuple(all_names[device] for device in self._devices(number))
            hello = self._clients[number].hello or self._expected(number, names)
            found.append(self._group(number, names, self._left(number, hello)))
        if self._num_homes == len(self._clients):
            return tuple(found)
        return tuple(replace(group, neighbours=neighbours_of(group, found)) for group in found)

    def _group(self, number: int, names: tuple[str, ...], hello: Hello) -> EngineGroup:
        client = self._clients[number]
        stats = in_all(client.stats, len(names)) if client.stats is not None else None
        is_shared = number >= self._num_homes
        return EngineGroup(names, hello, stats, client.state, frozenset(client.models), is_shared)

    def _left(self, number: int, hello: Hello) -> Hello:
        """Return a group's figures without the memory that the processes of other, shared groups take."""
        taken_bytes = self._sharing.overhead_bytes(self._devices(number), self._clients[number])
        if not taken_bytes:
            return hello
        return msgspec.structs.replace(hello, device_budget_bytes=hello.device_budget_bytes - taken_bytes)

    def _expected(self, number: int, names: tuple[str, ...]) -> Hello:
        """Return what the engine of a shared group will report once it is started."""
        config = self._config_of(number)
        first = self._clients[0].hello
        assert first is not None, "the engines of all other groups have been ready"
        return msgspec.structs.replace(
            first, device=names[0], device_budget_bytes=config.device_budget_bytes, host_budget_bytes=0
        )

    def _config_of(self, number: int) -> EngineConfig:
        """Return the configuration of a shared group's engine: what the engines of its devices have, less what its process takes."""
        devices = set(self._devices(number))
        hellos = [
            client.hello
            for home, client in enumerate(self._homes)
            if client.hello is not None and not devices.isdisjoint(self._devices(home))
        ]
        config = self._configs[number]
        overhead_bytes = self._shared[number - self._num_homes].overhead_bytes
        budget_bytes = min(hello.device_budget_bytes for hello in hellos) - overhead_bytes
        host_bytes = config.host_budget_bytes or min(hello.host_budget_bytes for hello in hellos) // (
            2 * config.host_sharers
        )
        return msgspec.structs.replace(config, device_budget_bytes=budget_bytes, host_budget_bytes=host_bytes)

    def figures(self) -> dict[str, ModelFigures]:
        """Return the figures of all models by id, those of all devices together."""
        return {model.model_id: model for group in self.groups if group.stats for model in group.stats.models}

    def check(self) -> None:
        """Raise Unavailable unless an engine is ready."""
        if self.state is not EngineState.READY:
            for client in self._homes:
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

    async def _start(self, number: int) -> EngineClient:
        """Return the engine of a group, and start it first if the group is shared. Raises Unavailable if it cannot be started."""
        if number < self._num_homes:
            return self._clients[number]
        if number not in self._starts:
            self._starts[number] = asyncio.create_task(self._start_shared(number), name=f"start of group {number}")
        await asyncio.shield(self._starts[number])
        client = self._clients[number]
        try:
            await client.wait_ready()
        except Unavailable:
            if client.hello is None and client is self._clients[number]:
                self._renew(number)
                await client.stop(0.0)
            raise
        return client

    @contextlib.asynccontextmanager
    async def _used(self, number: int) -> AsyncIterator[EngineClient]:
        """Start the engine of a group if it does not run, and keep it running for the block. Raises Unavailable if it cannot be started."""
        self._loading[number] += 1
        try:
            if (end := self._ends.get(number)) is not None:
                if number not in self._ending:
                    end.cancel()
                await asyncio.wait((end,))
            yield await self._start(number)
        finally:
            self._loading[number] -= 1
            self._end_if_idle(number)

    def _end_if_idle(self, number: int) -> None:
        """End the engine of a shared group once it has been without a model for `idle_s`."""
        if self._is_idle(number) and number in self._starts and number not in self._ends:
            end = self._ends[number] = asyncio.create_task(self._end(number), name=f"end of group {number}")
            end.add_done_callback(lambda _: self._ends.pop(number))

    def _is_idle(self, number: int) -> bool:
        return number >= self._num_homes and not self._loading[number] and not self._clients[number].models

    async def _end(self, number: int) -> None:
        try:
            await asyncio.sleep(self._idle_s)
            if not self._is_idle(number) or number not in self._starts:
                return
            log.info("the engine of group %d ends: it had no model for %g s", number, self._idle_s)
            self._ending.add(number)
            await self._clients[number].stop(0.0)
            self._renew(number)
        finally:
            self._ending.discard(number)

    def _renew(self, number: int) -> None:
        """Put a new client in the place of one whose engine has ended or could not be started, so that a later load starts it."""
        old, client = self._clients[number], self._client(number)
        if self._listener is not None:
            client.listen(self._listener)
        self._clients[number] = client
        self._num_past_restarts += old.restarts
        self._sharing.renew(old, client)
        del self._starts[number]
        self.changes.notify()

    async def _start_shared(self, number: int) -> None:
        client = self._clients[number]
        await self._sharing.admit(client)
        client.configure(self._config_of(number))
        client.start()

    async def load(self, request: Load, wanted: Wanted, last_used_s: Mapping[str, float]) -> ModelFacts:
        """Admit a model and return when it is admitted. A caller that stops waiting must call `unload`. Raises the engine's error, or Unavailable.

        `wanted`: the number of devices that share it; with "auto", a group in which it does not fit is followed by a larger one.
        """
        tried: list[tuple[int, int]] = []
        refusal: ModelTooLarge | None = None
        for number in self._candidates(request, wanted, last_used_s):
            size = self.sizes[number]
            budget_bytes = self.groups[number].hello.device_budget_bytes
            if any(size == other and budget_bytes <= most for other, most in tried):
                continue
            try:
                async with self._used(number) as client:
                    return await self._load(request, client, size)
            except ModelTooLarge as error:
                refusal = error
                tried.append((size, budget_bytes))
        raise refusal or LoadFailed(f"its base {request.adapter_of} is not loaded here", model=request.model_id)

    async def _load(self, request: Load, client: EngineClient, size: int) -> ModelFacts:
        if request.adapter_of:
            self._bases[request.model_id] = request.adapter_of
        self._awaited[request.model_id] = client, request.checkpoint.weight_bytes
        try:
            return msgspec.structs.replace(await client.load(request), num_devices=size)
        finally:
            del self._awaited[request.model_id]

    async def unload(self, model_id: str) -> None:
        """Unload a model and return when its memory is free, at once if no engine has it."""
        client = self._find(model_id)
        if client is not None:
            await client.unload(model_id)
            if client in self._clients:
                self._end_if_idle(self._clients.index(client))
        self._bases.pop(model_id, None)
        self._sharing.forget(model_id)

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
        self._sharing.use(model_id)
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
        client = self._clients[number]
        awaited_bytes = sum(bytes_ for owner, bytes_ in self._awaited.values() if owner is client) // group.size
        rooms = group.rooms(last_used_s, leave_out)
        residents = tuple({one.model_id: one for room in rooms for one in room.residents}.values())
        free_bytes = min(room.free_bytes for room in rooms) - awaited_bytes
        return GroupRoom(group.size, group.hello.device_budget_bytes, free_bytes, residents)
