"""Builds and runs the parts of a pod whose callers several processes serve: their reserved ports, their control and their supervision."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable

from common.addresses import check_free, parse_address, reserve
from common.exit_status import CANNOT_START
from mesh.api.request_log import logs_requests
from mesh.config.schema import MeshConfig
from mesh.envoy.bootstrap import envoy_files
from mesh.envoy.data_plane import DataPlane
from mesh.envoy.plan import Carrier, Here
from mesh.errors import InvalidRequest
from mesh.pod.carried_names import carried_names, runtime_addresses
from mesh.pod.limits import request_memory_bytes
from mesh.pod.placement_parts import PlacementParts, PodBase
from mesh.pod.worker_process import RunningWorker
from mesh.workers.control import WorkerControl
from mesh.workers.messages import Start

logger = logging.getLogger(__name__)

START_S = 60.0  # in which all workers must listen when the pod starts
_STABLE_AFTER_S = 30.0  # a worker that ran this long resets the count of failures
_BACKOFF_S = (0.2, 1.0, 3.0, 10.0)
_MOST_FAILED_STARTS = 3  # of one worker, while the pod starts
_END_S = 1.0  # a worker's time between closing its link and its end

StartWorker = Callable[[], Awaitable[RunningWorker]]


def check_workers(config: MeshConfig) -> None:
    """Raise InvalidRequest for settings that workers cannot serve."""
    if not config.workers:
        return
    if config.envoy:
        raise InvalidRequest("workers and envoy are both set: each carries the calls of loaded models; set one of them")
    for name in ("grpc_listen", "http_listen"):
        if (address := str(getattr(config, name))).startswith("unix:"):
            raise InvalidRequest(f"{name} {address}: workers share a port; give HOST:PORT, or set workers to 0")
    share, largest = request_memory_bytes(config), max(config.grpc_max_message_bytes, config.http_max_body_bytes)
    if share < largest:
        raise InvalidRequest(
            f"request_memory_bytes {config.request_memory_bytes}: {config.workers} workers and the control process have {share} bytes "
            f"each, and one request may have {largest}; set at least {largest * (config.workers + 1)}, or fewer workers"
        )


class PodWorkers:
    """The parts of one pod, not started. `start_worker` starts one worker."""

    def __init__(self, base: PodBase, parts: PlacementParts, start_worker: StartWorker) -> None:
        self._config = base.config
        self._own_id = base.instance_id
        self._start_worker = start_worker
        self._files = envoy_files(base.config)
        self._addresses = {Carrier.GRPC: base.config.grpc_listen, Carrier.HTTP: base.config.http_listen}
        self._reserved: dict[Carrier, socket.socket] = {}
        self._leaving = asyncio.Event()
        self._supervising: list[asyncio.Task[None]] = []
        self._is_open = False
        self._control = WorkerControl(is_foreign=lambda: parts.monitor.snapshot.foreign, logs_requests=logs_requests)
        parts.in_flight.listen(self._lost)
        self._data_plane = DataPlane(
            carried_names(base, parts, secure_address=lambda _: "", carries_limited=False),
            parts.copies,
            base.changes,
            base.metrics,
            self._control,
            parts.carried,
            here=self._here,
            is_ready=lambda: parts.monitor.limits is not None,
            write_files=lambda limit, names: None,
        )
        self._data_plane.control_by(self._control)

    @property
    def is_connected(self) -> bool:
        """Whether all workers listen."""
        return self._control.num_listening == self._config.workers

    @property
    def ports(self) -> dict[Carrier, int]:
        return {carrier: int(holder.getsockname()[1]) for carrier, holder in self._reserved.items()}

    async def start(self) -> None:
        """Reserve the ports. Raises ConfigError, OSError."""
        self._files.make_directory()
        for carrier, text in self._addresses.items():
            address = parse_address(text)
            await asyncio.to_thread(check_free, address, carrier)
            self._reserved[carrier] = reserve(address)

    async def open(self) -> None:
        """Start the workers, and return when they listen. Raises OSError if one cannot start, or does not listen in time."""
        self._supervising = [asyncio.create_task(self._supervise()) for _ in range(self._config.workers)]
        connected = asyncio.create_task(self._connected())
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait((connected, *self._supervising), timeout=START_S, return_when=first)
        if not connected.done():
            connected.cancel()
            for ended in done:
                ended.result()
        if not done:
            raise OSError(f"{self._control.num_listening} of {self._config.workers} workers listen after {START_S:g} s")
        self._is_open = True

    async def _connected(self) -> None:
        while not self.is_connected:
            await self._control.wait()

    async def run(self) -> None:
        await self._data_plane.run()

    async def withdraw(self, model_id: str) -> None:
        """Withdraw the model as LocalUnloads does."""
        await self._data_plane.withdraw(model_id)

    async def drain(self, grace_s: float) -> None:
        """Have the workers take no further connections, and return when they have ended, or the grace period is over."""
        self._leaving.set()
        self._control.leave()
        if self._supervising:
            _, running = await asyncio.wait(self._supervising, timeout=grace_s + _END_S)
            if running:
                logger.warning(
                    "%d workers have not ended after the grace period of %g s; killing them", len(running), grace_s
                )
                self._control.kill()

    async def stop(self) -> None:
        self._leaving.set()
        self._control.kill()
        if self._supervising:
            await asyncio.wait(self._supervising)
        for holder in self._reserved.values():
            holder.close()

    def _here(self) -> Here:
        mesh = {carrier: self._files.mesh(carrier) for carrier in Carrier}
        return Here(runtime=runtime_addresses(self._config), mesh=mesh)

    def _lost(self, instance_id: str, committed: bool) -> None:
        if instance_id == self._own_id:
            self._control.lose(committed=committed)

    def _start_message(self) -> Start:
        listen = {
            carrier: f"{text.rpartition(':')[0]}:{self.ports[carrier]}" for carrier, text in self._addresses.items()
        }
        control = {carrier: self._files.mesh(carrier) for carrier in Carrier}
        return Start(self._config, self._own_id, listen, control)

    async def _supervise(self) -> None:
        """Keep one worker running until the pod leaves. The calls of a worker that ends before that are lost."""
        num_failures = 0
        while not self._leaving.is_set():
            started_s = time.monotonic()
            try:
                ended = await self._serve_one(is_last_try=num_failures + 1 >= _MOST_FAILED_STARTS)
            except OSError as error:
                if not self._is_open:
                    raise
                ended = f"a worker cannot be started: {error}"
            if self._leaving.is_set():
                return
            num_failures = 1 if time.monotonic() - started_s > _STABLE_AFTER_S else num_failures + 1
            pause_s = _BACKOFF_S[min(num_failures, len(_BACKOFF_S)) - 1]
            logger.warning("%s; starting another one in %g s", ended, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._leaving.wait()

    async def _serve_one(self, *, is_last_try: bool) -> str:
        """Serve one worker until it has ended, and return how it ended. Raises OSError if it cannot start.

        While the pod starts, a worker that ends before it listens may be tried again, unless its status or `is_last_try` rules it out.
        """
        worker = await self._start_worker()
        has_listened = await self._control.serve(worker.link, self._start_message(), worker.kill)
        status = await _ended(worker)
        is_starting = not self._is_open and not self._leaving.is_set()
        if not has_listened and is_starting and (status == CANNOT_START or is_last_try):
            raise OSError(f"a worker ended with status {status} before it listened")
        return f"a worker ended with status {status}"


async def _ended(worker: RunningWorker) -> int:
    """Return the status of a worker whose link is closed. One that does not end by itself is killed."""
    ending = asyncio.ensure_future(worker.wait())
    await asyncio.wait((ending,), timeout=_END_S)
    if not ending.done():
        worker.kill()
    return await ending
