"""Serves the callers of a pod in one of several processes: carries the calls of loaded models, and passes all others on to the control process."""

import asyncio

from common.changes import Changes
from mesh.access.access import callers_identity
from mesh.access.key_table import KeyTable
from mesh.api.request_log import log_requests
from mesh.api.request_memory import RequestMemory
from mesh.api.web_guard import policy_for
from mesh.api.worker_grpc import WorkerGrpc
from mesh.api.worker_http import WorkerHttp
from mesh.client.connections import Connections
from mesh.client.runtime import GrpcRuntime
from mesh.envoy.plan import Carrier
from mesh.pod.carried_names import runtime_addresses
from mesh.pod.limits import connection_limits, grpc_limits, request_memory_bytes
from mesh.routing.in_flight import InFlight
from mesh.routing.runtime_silence import RuntimeSilence
from mesh.types import Target
from mesh.workers.carried_calls import CarriedCalls
from mesh.workers.link import Link
from mesh.workers.messages import Ask, Confirmed, Leave, Listening, Lose, Start, Table, ToWorker

_CONTROL = "the control process"  # in errors, in place of a pod's id


class Worker:
    """`start` is the first message of the link. Raises ConfigError for files that cannot be read."""

    def __init__(self, link: Link[ToWorker], start: Start) -> None:
        config = start.config
        self._link = link
        self._own_id = start.instance_id
        self._grace_s = config.grace_s
        self._connections = Connections(max_message_bytes=config.grpc_max_message_bytes)
        self._in_flight = InFlight()
        self._is_foreign = False
        self._keys = KeyTable(config.api_keys, config.api_keys_file)
        self._tls = callers_identity(config)
        self._silence = RuntimeSilence(
            self._own_id,
            self._in_flight,
            Changes(),
            look=GrpcRuntime(self._connections.grpc(config.runtime_grpc)).look,
            is_foreign=lambda: self._is_foreign,
        )
        runtime = runtime_addresses(config)
        self._calls = CarriedCalls(
            Target(self._own_id, True, runtime[Carrier.GRPC], runtime[Carrier.HTTP]),
            Target(_CONTROL, False, start.control[Carrier.GRPC], start.control[Carrier.HTTP], is_control=True),
            self._in_flight,
            lambda: self._silence.is_mute,
        )
        memory = RequestMemory(request_memory_bytes(config))
        self._grpc = WorkerGrpc(
            start.listen[Carrier.GRPC],
            self._calls,
            self._connections,
            self._keys,
            tls=self._tls,
            limits=grpc_limits(config),
            memory=memory,
        )
        self._http = WorkerHttp(
            start.listen[Carrier.HTTP],
            self._calls,
            self._connections,
            self._keys,
            tls=self._tls,
            limits=connection_limits(config, num_processes=config.workers),
            memory=memory,
            max_body_bytes=config.http_max_body_bytes,
            web_policy=policy_for(
                config.http_listen, (*config.allowed_hosts, config.advertise_host), config.cors_origins
            ),
            grace_s=config.grace_s,
        )

    async def run(self) -> None:
        """Serve until control has the worker leave, or has gone. Raises OSError if a port cannot be listened on.

        A worker that cannot follow its keys, its certificate or its table any more ends with the error, and another one takes its place.
        """
        await self._grpc.start()
        await self._http.start()
        self._link.send(Listening())
        leaving = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._keys.run()), tasks.create_task(self._silence.run())]
                if self._tls is not None:
                    running.append(tasks.create_task(self._tls.run()))
                following, left = tasks.create_task(self._follow(leaving)), tasks.create_task(leaving.wait())
                await asyncio.wait((following, left), return_when=asyncio.FIRST_COMPLETED)
                if leaving.is_set():
                    # Control still takes calls, and asks for those that have not ended.
                    await asyncio.gather(self._grpc.stop(self._grace_s), self._http.stop())
                for task in (following, left, *running):
                    task.cancel()
        finally:
            # Without control, nothing keeps the table up to date: calls that have not ended are cut off.
            await self._grpc.stop(0.0)
            await self._connections.close()
            self._link.close()

    async def _follow(self, leaving: asyncio.Event) -> None:
        async for message in self._link.messages():
            match message:
                case Table(generation):
                    self._calls.apply(message)
                    self._is_foreign = message.is_foreign
                    log_requests(message.logs_requests)
                    self._link.send(Confirmed(generation))
                case Ask(number):
                    self._link.send(self._calls.figures(number))
                case Lose(committed):
                    self._in_flight.lose(self._own_id, committed=committed)
                case Leave():
                    leaving.set()
                case Start():
                    raise ValueError("a worker is started once")
