"""The runtime's own gRPC services over a fake engine, with scripted files."""

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import grpc.aio
import msgspec

from common.model_key import ModelSettings, Quantization
from runtime.api.mesh_only import MeshOnly
from runtime.api.spi import SERVICE_NAME as SPI_NAME
from runtime.api.spi import ModelRuntimeApi, add_spi
from runtime.api.state import SERVICE_NAME as STATE_NAME
from runtime.api.state import RuntimeStateApi, add_state
from runtime.config.schema import RuntimeConfig
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.errors import LoadFailed
from runtime.models.manager import Models
from runtime.puller.inspection import ModelMetadata
from runtime.puller.sizing import Geometry, needs_of
from runtime.types import ModelSource
from tests.support.engines import fake_command
from tests.support.preparers import ScriptedPreparer, no_text

SLAB = 4096
GEOMETRY = Geometry("FakeForCausalLM", 2, 1, 8, 16, 32, 100, 64, "float32")


class ScriptedFitter:
    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.ended: list[str] = []

    async def look(
        self,
        source: ModelSource,
        settings: ModelSettings,
        device: str,
        *,
        group_sizes: Collection[int] = (),
        local_only: bool = False,
    ) -> ModelMetadata:
        if source.uri.startswith("slow:"):
            await self.may_end.wait()
            self.ended.append(source.uri)
        if source.uri.startswith("missing:"):
            raise LoadFailed(f"{source.uri}: no such files")
        return ModelMetadata(
            GEOMETRY,
            needs_of(GEOMETRY, (), settings, device),
            Quantization.NONE,
            exact=False,
            config={"uri": source.uri},
            shared_needs={size: needs_of(GEOMETRY, (), settings, device, size) for size in group_sizes},
        )

    async def refusal(self, look: ModelMetadata, settings: ModelSettings) -> str:
        return "FakeForCausalLM is not supported" if look.config["uri"] == "/models/odd" else ""


class SpiRuntime:
    def __init__(
        self,
        tmp_path: Path,
        config: RuntimeConfig,
        restart: RestartPolicy | None = None,
        group_sizes: Sequence[int] = (1,),
    ) -> None:
        restart = restart or RestartPolicy(first_s=0.01, start_timeout_s=20.0)
        engines = [msgspec.structs.replace(config.engine, tensor_parallel=size) for size in group_sizes]
        self.engine = EngineGroups(engines, command=fake_command(), restart=restart)
        self.preparer = ScriptedPreparer(0.05)
        self.models = Models(config, self.engine, self.preparer, no_text)
        self.server = grpc.aio.server(interceptors=(MeshOnly(SPI_NAME, STATE_NAME),))
        self.fitter = ScriptedFitter()
        self._config = config
        self.add_services(self.server)
        self.address = f"unix:{tmp_path / 'spi.sock'}"
        self.server.add_insecure_port(self.address)

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add the mesh's services to a server."""
        parts = (self._config, self.engine, self.models, self.fitter, 1 << 30)
        add_spi(server, ModelRuntimeApi(*parts))
        add_state(server, RuntimeStateApi(*parts))
