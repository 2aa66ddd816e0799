"""Runs one serving runtime (`python -m runtime`): reads the configuration, connects the parts, listens, and shuts down on SIGTERM."""

import os

# gRPC's fork handlers are for children that use gRPC. Ours exec at once, and each would log a line. This must be set before gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import grpc.aio
import msgspec
import uvloop
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import logs
from common.addresses import check_free, parse_address
from common.background_tasks import BackgroundTasks, wait_for_any
from common.config import unknown_variables
from common.errors import ConfigError
from common.exit_status import CANNOT_START, USAGE
from common.grpc.health import Health
from common.grpc.reflection import reflection_handlers
from common.model_state import ModelFigures
from runtime.api.grpc_request_log import GrpcRequestLog
from runtime.api.grpc_services import INFERENCE_SERVICES, add_inference_services
from runtime.api.http_app import build_http_app, http_runner
from runtime.api.mesh_only import MeshOnly
from runtime.api.spi import SERVICE_NAME as SPI_NAME
from runtime.api.spi import ModelRuntimeApi, add_spi
from runtime.api.state import SERVICE_NAME as STATE_NAME
from runtime.api.state import RuntimeStateApi, add_state
from runtime.config.loader import configure
from runtime.config.schema import EngineConfig, RuntimeConfig
from runtime.engine_client.client import CommandBuilder
from runtime.engine_client.group_plan import SharedGroup, parse_groups, plan_groups, plan_shared_groups, share_devices
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.process import engine_command
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.engine_client.shared_memory import SharedMemoryFile, wants_arena
from runtime.engine_client.visible_gpus import visible_gpus
from runtime.errors import InvalidRequest, RepertoryError, Unavailable
from runtime.generation.generator import Generator
from runtime.models.manager import Models
from runtime.models.model_state import ModelView
from runtime.observability.adapter_metrics import LoadedAdapter
from runtime.observability.metrics import RuntimeMetrics
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.sources.destinations import Destinations
from runtime.text.text_model import load_text

log = logging.getLogger("runtime")

_BACKLOG = 4096  # A unix socket refuses connections beyond it at once, and a mesh may open hundreds together.


class Runtime:
    """Builds the parts of the front process without starting them. `run` starts them, and returns the exit status when they have ended."""

    def __init__(
        self,
        config: RuntimeConfig,
        engines: Sequence[EngineConfig],
        shared: Sequence[SharedGroup] = (),
        *,
        command: CommandBuilder = engine_command,
    ) -> None:
        """`engines`: the configurations of the engines, one per group of devices. `shared`: further groups of the same devices."""
        self._config = config
        self._addresses = [parse_address(text) for text in config.listen]
        self._http_address = parse_address(config.http_listen)
        Destinations.parse(config.source_hosts)  # An invalid entry must fail at the start, not at the first load.
        cache = Cache(_cache_dir(config), config.cache_budget_bytes)
        restart = RestartPolicy(silence_s=config.engine_silence_s)
        self._engine = EngineGroups(engines, shared=shared, command=command, restart=restart)
        self._preparation = CheckpointPreparer(config, cache)
        self._models = Models(config, self._engine, self._preparation, load_text)
        self._metrics = RuntimeMetrics(max_adapters=config.engine.max_adapters)
        generator = Generator(self._engine, self._metrics)
        self._server = grpc.aio.server(
            interceptors=(
                MeshOnly(SPI_NAME, STATE_NAME, allow_remote=config.remote_mesh),
                GrpcRequestLog(*INFERENCE_SERVICES),
            ),
            options=(
                ("grpc.so_reuseport", 0),  # Two runtimes that share one port would split its requests without an error.
                ("grpc.max_receive_message_length", config.grpc_max_message_bytes),
                ("grpc.max_send_message_length", config.grpc_max_message_bytes),
                # By default gRPC closes connections on which a client pings more than twice in five minutes without data.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # A crashed host sends no FIN, and its row would run to the end.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.ping_timeout_ms", 20_000),
            ),
        )
        self._state = RuntimeStateApi(config, self._engine, self._models, self._preparation, cache.budget_bytes, cache)
        self._health = Health()
        self._services = [
            add_spi(
                self._server, ModelRuntimeApi(config, self._engine, self._models, self._preparation, cache.budget_bytes)
            ),
            add_state(self._server, self._state),
            *INFERENCE_SERVICES,
        ]
        add_inference_services(self._server, self._models, self._engine, config, self._metrics, generator=generator)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._server.add_generic_rpc_handlers(reflection_handlers((*self._services, health_name)))
        app = build_http_app(self._models, self._engine, config, self._metrics, generator=generator)
        self._runner = http_runner(app, grace_s=config.grace_s)

    async def run(self, stop: asyncio.Event) -> int:
        """Run until `stop` is set (0), the engine is given up or a task of the process fails (1), or the engine can never start (CANNOT_START).

        Raises Unavailable if an address is taken.
        """
        try:
            await self._listen()
        except BaseException:
            await self._engine.stop(0.0)
            self._preparation.close()
            raise
        self._engine.start()
        # Objects that exist now live as long as the process. Collecting them would delay every stream.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        tasks = BackgroundTasks()
        tasks.start(self._watch(stop))
        log.info("listening on %s and %s", ", ".join(str(address) for address in self._addresses), self._http_address)
        try:
            await wait_for_any(stop, tasks.failed)
            status = 1 if tasks.failed.is_set() else self._status()
        finally:
            await tasks.cancel()
            await self._end()
        return status

    def _status(self) -> int:
        if self._engine.state is not EngineState.STOPPED:
            return 0
        return 1 if self._engine.has_started else CANNOT_START

    async def _listen(self) -> None:
        for address in (*self._addresses, self._http_address):
            try:
                await asyncio.to_thread(check_free, address)
            except OSError as error:
                raise Unavailable(str(error)) from None
        await self._runner.setup()
        site: web.BaseSite
        if self._http_address.path:
            site = web.UnixSite(self._runner, self._http_address.path, backlog=_BACKLOG)
        else:
            site = web.TCPSite(self._runner, self._http_address.host, self._http_address.port, backlog=_BACKLOG)
        try:
            await site.start()
            for address in self._addresses:
                self._server.add_insecure_port(str(address))
            await self._server.start()
        except (OSError, RuntimeError) as error:
            await self._runner.cleanup()
            raise Unavailable(f"cannot listen: {error}") from None

    async def _watch(self, stop: asyncio.Event) -> None:
        """Update health checks and metrics with the engine's state."""
        seen: EngineState | None = None
        while True:
            count = self._engine.changes.version
            if self._engine.state is not seen:
                seen = self._engine.state
                serving = (
                    health_pb2.HealthCheckResponse.SERVING
                    if seen is EngineState.READY
                    else health_pb2.HealthCheckResponse.NOT_SERVING
                )
                for service in ("", *self._services):
                    await self._health.set(service, serving)
                if seen is EngineState.STOPPED:
                    log.error("the engine is given up: %s", self._engine.failure)
                    stop.set()
            views, figures = self._models.views(), self._engine.figures()
            names = {view.model_id: view.settings.display_name or view.model_id for view in views}
            self._metrics.update(self._engine.groups, names)
            self._metrics.adapters.update(loaded_adapters(views, figures, names))
            await self._engine.changes.wait(since=count)

    async def _end(self) -> None:
        """Refuse new requests, let running ones end within the grace period, then stop the engine."""
        log.info("ending within %g s", self._config.grace_s)
        await self._health.enter_graceful_shutdown()
        self._state.stop()
        await self._models.stop_loads()
        await asyncio.gather(self._server.stop(self._config.grace_s), self._runner.cleanup())
        await self._models.close()
        self._preparation.close()
        await self._engine.stop(1.0)
        for address in (*self._addresses, self._http_address):
            if address.path:
                await asyncio.to_thread(Path(address.path).unlink, missing_ok=True)


def loaded_adapters(
    views: Sequence[ModelView], figures: Mapping[str, ModelFigures], names: Mapping[str, str]
) -> list[LoadedAdapter]:
    """Join the manager's loaded LoRA adapters with the engines' figures of them. Both mappings are by id."""
    return [
        LoadedAdapter(
            names[view.model_id],
            names.get(base, base),
            view.facts.adapter_rank,
            view.load_seconds,
            figures[view.model_id],
        )
        for view in views
        if (base := view.settings.adapter_of) and view.facts is not None and view.model_id in figures
    ]


def _cache_dir(config: RuntimeConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repertory"


async def _serve(config: RuntimeConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # A device with a number is one group, whatever else there is.
    is_counted = bool(config.gpu_groups) or ":" not in config.engine.device
    sizes, *layers = parse_groups(config.gpu_groups) or ((),)
    engines = plan_groups(config.engine, sizes, visible_gpus(config.engine.device) if is_counted else 0)
    shared = plan_shared_groups(engines, layers) if layers or not sizes else []
    engines = share_devices(engines, shared)
    arenas: list[SharedMemoryFile] = []
    if wants_arena(config.engine.device) and not config.engine.host_arena_path:
        arenas = [SharedMemoryFile() for _ in (*engines, *shared)]
        paths = iter(str(arena.path) for arena in arenas)
        engines = [msgspec.structs.replace(engine, host_arena_path=next(paths)) for engine in engines]
        shared = [
            replace(group, config=msgspec.structs.replace(group.config, host_arena_path=next(paths)))
            for group in shared
        ]
    try:
        return await Runtime(config, engines, shared).run(stop)
    finally:
        for arena in arenas:
            arena.remove()


def main(arguments: list[str]) -> int:
    try:
        config = configure(arguments, os.environ)
        logs.set_up(as_json=config.log_json, level=config.log_level)
        for name in unknown_variables(os.environ, RuntimeConfig):
            log.warning("the environment variable %s has no effect: docs/configuration.md lists the settings", name)
        return int(uvloop.run(_serve(config)))
    except RepertoryError as error:
        print(f"repertory runtime: {error.message}", file=sys.stderr)
        return USAGE if isinstance(error, InvalidRequest) else 1
    except ConfigError as error:
        print(f"repertory runtime: {error}", file=sys.stderr)
        return USAGE
    except (OSError, ValueError) as error:
        print(f"repertory runtime: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
