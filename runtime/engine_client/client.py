"""Connects the front process to the engine: loads, token streams and statistics, and a supervisor that restarts the engine after a crash.

A crash ends all streams. The listener (runtime.models) decides what it means for the models.
"""

import asyncio
import contextlib
import itertools
import logging
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from common.changes import Changes
from runtime.config.schema import EngineConfig
from runtime.engine_client.lifecycle import EngineDeath, EngineListener, EngineState
from runtime.engine_client.process import EngineProcess, engine_command
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.engine_client.streams import DeliveryPacer, RowStream, end_error
from runtime.errors import EngineUnfit, ModelTooLarge, RepertoryError, Unavailable, from_code
from runtime.ipc.crash_marker import CrashMarker
from runtime.ipc.messages import (
    Abort,
    Add,
    Command,
    EngineStats,
    Event,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    RowTokens,
    Shutdown,
    StartFailed,
    Tokens,
    Unload,
    Unloaded,
)
from runtime.types import FinishReason, GenerationRequest, ModelFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

CommandBuilder = Callable[[Path, EngineConfig, Path], list[str]]


class EngineClient:
    """Supervises one engine process and exchanges messages with it. Call `start` first and `stop` last, all on one event loop.

    Args:
        changes: is notified of changes; None = one of its own.
        label: names the engine in logs and errors.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: CommandBuilder = engine_command,
        restart: RestartPolicy | None = None,
        changes: Changes | None = None,
        label: str = "the engine",
    ) -> None:
        self._label = label
        self._config = config
        self._command = command
        self._restart = restart or RestartPolicy()
        self._run_dir = Path(tempfile.mkdtemp(prefix="repertory-engine-"))
        self._crash_marker = CrashMarker(self._run_dir / "crash-marker")
        self._listener: EngineListener | None = None
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._hello: asyncio.Future[Hello] | None = None
        self._streams: dict[int, RowStream] = {}
        self._pace = DeliveryPacer()
        self._open: Counter[str] = Counter()
        self._loads: dict[str, deque[asyncio.Future[ModelFacts]]] = {}
        self._unloads: dict[str, deque[asyncio.Future[None]]] = {}
        self._ids = itertools.count(1)
        self._stopping = False
        self.state = EngineState.STARTING
        self.restarts = 0
        self.hello: Hello | None = None
        self.stats: EngineStats | None = None
        self.failure = ""
        self.changes = changes or Changes()
        self.models: set[str] = set()  # those that were to be loaded, and were not unloaded or refused since

    def listen(self, listener: EngineListener) -> None:
        self._listener = listener

    def configure(self, config: EngineConfig) -> None:
        """Replace the configuration. Call it before `start`."""
        self._config = config

    def start(self) -> None:
        """Start the engine and its supervision. `wait_ready` returns when loads are possible."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> Hello:
        """Wait until an engine is ready. Raises Unavailable once restarting has been given up."""
        while self.state is not EngineState.READY:
            if self.state is EngineState.STOPPED:
                raise Unavailable(self.failure or f"{self._label} is stopped")
            await self.changes.wait()
        assert self.hello is not None
        return self.hello

    async def stop(self, grace_s: float) -> None:
        """Let running sequences end within `grace_s`, then stop the engine. Idempotent."""
        self._stopping = True
        process = self._process
        if process is not None and self.state is EngineState.READY and process.send(Shutdown(grace_s)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s + 5.0):
                    await process.ended.wait()
        self._set_state(EngineState.STOPPED)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._process is not None:
            await self._process.kill()
        self._fail_all(Unavailable("the runtime is shutting down"))
        self._crash_marker.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    # Models

    async def load(self, request: Load) -> ModelFacts:
        """Admit a model and return when it is admitted. A caller that stops waiting must call `unload`. Raises the engine's error, or Unavailable."""
        self.models.add(request.model_id)
        try:
            return await self._ask(request, self._loads)
        except RepertoryError as error:
            if not isinstance(error, Unavailable):  # After a crash the model is loaded here again, or unloaded.
                self.models.discard(request.model_id)
            raise

    async def unload(self, model_id: str) -> None:
        """Unload a model and return when its memory is free, at once if no engine runs."""
        with contextlib.suppress(Unavailable):
            await self._ask(Unload(model_id), self._unloads)
        self.models.discard(model_id)

    def running(self, model_id: str) -> int:
        """Return the number of the model's open sequences, queued ones included."""
        return self._open[model_id]

    async def drain(self, model_id: str, timeout_s: float) -> bool:
        """Wait until no sequence of the model is open. Return False after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while self._open[model_id]:
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                return False
            await self.changes.wait(left_s)
        return True

    # Tokens

    async def generate(self, model_id: str, request: GenerationRequest) -> AsyncIterator[RowTokens]:
        """See runtime.interfaces.TokenEngine."""
        request_id = next(self._ids)
        stream = RowStream(model_id, request.event_s)
        self._send(Add(request_id, model_id, request))
        self._streams[request_id] = stream
        self._pace.opened(stream)
        self._open[model_id] += 1
        try:
            while True:
                row = await stream.take()
                if row.finish is FinishReason.ERROR or row.finish is FinishReason.ABORTED:
                    if row.tokens:
                        yield msgspec.structs.replace(row, finish=None, stop_token=None, error_code=None, error=None)
                    raise end_error(model_id, row)
                yield row
                if row.finish is not None:
                    return
        finally:
            if self._close_stream(request_id):
                process = self._process
                if process is not None:
                    process.send(Abort((request_id,)))

    def _close_stream(self, request_id: int) -> bool:
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return False
        self._pace.closed(stream)
        self._open[stream.model_id] -= 1
        if not self._open[stream.model_id]:
            del self._open[stream.model_id]
            self.changes.notify()
        return True

    # Events

    def _on_event(self, event: Event) -> None:
        match event:
            case Tokens(rows=rows):
                now_s = asyncio.get_running_loop().time()
                for row in rows:
                    stream = self._streams.get(row.request_id)
                    if stream is None:
                        continue
                    self._pace.deliver(stream, row, now_s)
                    if row.finish is not None:
                        self._close_stream(row.request_id)
            case EngineStats():
                self.stats = event
                self.changes.notify()
            case Loaded(facts=facts):
                _answer(self._loads, facts.model_id, facts)
            case LoadFailed(model_id=model_id):
                failure = (
                    ModelTooLarge(event.message, model=model_id, limit=event.budget_bytes)
                    if event.budget_bytes
                    else from_code(event.code, event.message, model=model_id)
                )
                if not _answer(self._loads, model_id, failure) and self._listener is not None:
                    self.models.discard(model_id)
                    self._listener.engine_dropped(model_id, failure)
            case Unloaded(model_id=model_id):
                _answer(self._unloads, model_id, None)
            case Hello():
                if self._hello is not None and not self._hello.done():
                    self._hello.set_result(event)
            case StartFailed(message=message):
                if self._hello is not None and not self._hello.done():
                    self._hello.set_exception(EngineUnfit(message))

    def send(self, command: Command) -> bool:
        """Queue a command. Returns False if no engine is ready."""
        return self.state is EngineState.READY and self._process is not None and self._process.send(command)

    def _send(self, command: Command) -> None:
        if not self.send(command):
            raise self._absent()

    def check(self) -> None:
        """Raise Unavailable unless an engine is ready."""
        if self.state is not EngineState.READY:
            raise self._absent()

    def _absent(self) -> Unavailable:
        if self._stopping:
            return Unavailable("the runtime is shutting down")
        if self.state is EngineState.STOPPED:
            return Unavailable(self.failure or f"{self._label} is stopped")
        return Unavailable(f"{self._label} is {self.state.value}; try again", retry_after_s=5.0)

    async def _ask(self, command: Load | Unload, queues: "dict[str, deque[asyncio.Future[T]]]") -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._send(command)
        queues.setdefault(command.model_id, deque()).append(answer)
        return await answer

    # Supervision

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        policy = self._restart
        failed_starts = 0
        wait_s = policy.first_s
        for number in itertools.count():
            started_s = loop.time()
            try:
                process = await self._launch(number)
            except Unavailable as error:
                failed_starts += 1
                self.failure = error.message
                # Later an engine may fail to start because the memory of the one before is not free yet.
                has_run = self.hello is not None
                most = policy.max_failed_starts if has_run else policy.max_first_starts
                if isinstance(error, EngineUnfit) and not has_run:
                    most = 1
                if failed_starts >= most:
                    self._set_state(EngineState.STOPPED)
                    return
                log.error("%s did not start (%d of %d): %s", self._label, failed_starts, most, error.message)
            else:
                failed_starts = 0
                assert self.hello is not None
                process.watch(policy.silence_on(self.hello.device), self._has_work)
                await process.lost.wait()
                if not self._stopping:
                    # Set before the exit is known: a caller that is refused now must not see the state READY.
                    self._set_state(EngineState.RESTARTING)
                await process.ended.wait()
                self._died(process.exit_text)
            if self._stopping:
                return
            wait_s = policy.first_s if loop.time() - started_s > policy.healthy_s else min(wait_s * 2, policy.most_s)
            await asyncio.sleep(wait_s)

    async def _launch(self, number: int) -> EngineProcess:
        self._hello = asyncio.get_running_loop().create_future()
        socket_path = self._run_dir / f"engine-{number}.sock"
        command = self._command(socket_path, self._config, self._run_dir / "crash-marker")
        process = await EngineProcess.launch(
            command, socket_path, self._on_event, connect_timeout_s=self._restart.start_timeout_s
        )
        self._process = process
        ended = asyncio.create_task(process.ended.wait())
        try:
            await asyncio.wait(
                (self._hello, ended), timeout=self._restart.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ended.cancel()
        if not self._hello.done():
            await process.kill()
            raise Unavailable(f"{self._label} ended before it was ready: {process.exit_text}")
        if self._hello.exception() is not None:
            await process.kill()
        self.hello = self._hello.result()
        if self._config.shares_device and not self._config.device_budget_bytes:
            # What is free on the device at a restart depends on what other engines hold then.
            self._config = msgspec.structs.replace(self._config, device_budget_bytes=self.hello.device_budget_bytes)
        self.failure = ""
        self._set_state(EngineState.READY)
        log.info("%s is ready: pid %d, %s", self._label, process.pid, self.hello.device_name)
        if self._listener is not None:
            self._listener.engine_ready(frozenset(self.models))
        return process

    def _died(self, exit_text: str) -> None:
        if self._stopping:
            self._fail_all(Unavailable("the runtime is shutting down"))
            return
        marked = self._crash_marker.read()  # Set without requests as well, since graphs are captured at loads.
        death = EngineDeath(
            exit_text=exit_text,
            stepping=marked,
            loading=tuple(model_id for model_id, queue in self._loads.items() if queue),
            models=frozenset(self.models),
        )
        self._crash_marker.mark("")
        self._process = None
        self.restarts += 1
        self.stats = None
        self.failure = f"{self._label} {exit_text}"
        self._set_state(EngineState.RESTARTING)
        log.error(
            "%s %s; stepping %s, loading %s, %d streams lost",
            self._label,
            exit_text,
            death.stepping,
            death.loading,
            len(self._streams),
        )
        # The listener comes first: the consumers of the streams must find the models in their new state.
        if self._listener is not None:
            self._listener.engine_died(death)
        self._fail_all(Unavailable(f"{self._label} {exit_text}; it is being restarted", retry_after_s=5.0))

    def _has_work(self) -> bool:
        return bool(self._streams) or any(self._loads.values()) or any(self._unloads.values())

    def _fail_all(self, error: RepertoryError) -> None:
        for request_id in list(self._streams):
            self._streams[request_id].fail(error)
            self._close_stream(request_id)
        for queues in (self._loads, self._unloads):
            for queue in queues.values():
                for future in queue:
                    if not future.done():
                        future.set_exception(error)
            queues.clear()

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self.changes.notify()


def _answer(queues: "dict[str, deque[asyncio.Future[T]]]", model_id: str, result: T | RepertoryError) -> bool:
    """Resolve the oldest command of the model in `queues`; the engine answers in order. Return False if there is none."""
    queue = queues.get(model_id)
    if not queue:
        return False
    future = queue.popleft()
    if not queue:
        del queues[model_id]
    if future.done():
        return True
    if isinstance(result, RepertoryError):
        future.set_exception(result)
    else:
        future.set_result(result)
    return True
