"""One node's management side for tests: a store, the registry, moving vmodels and the management API on a real gRPC port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from mesh.api.management import ManagementService
from mesh.registry.registry import Registry
from mesh.registry.transitions import Transitions
from mesh.store.protocol import Store
from tests.support.fake_loader import FakeLoader
from wire.mmesh import model_mesh_pb2_grpc as rpc

NOW_MS = 1_800_000_000_000


@dataclass(frozen=True, slots=True)
class Node:
    registry: Registry
    loader: FakeLoader
    transitions: Transitions
    mesh: rpc.ModelMeshStub


@asynccontextmanager
async def running_node(store: Store, *, instance_id: str = "pod-a", move_wait_s: float = 20.0) -> AsyncIterator[Node]:
    """The store must be open; it stays open."""
    registry = Registry(
        store,
        root_prefix="",
        kv_prefix="mm",
        service_name="svc",
        instance_id=instance_id,
        session_ttl_s=5.0,
        default_owner="repertory",
    )
    await registry.start()
    loader = FakeLoader(registry)
    transitions = Transitions(registry, loader, loader, retry_every_s=3600.0)
    transitions.start()
    server = grpc.aio.server()
    service = ManagementService(registry, loader, loader, now_ms=lambda: NOW_MS, move_wait_s=move_wait_s)
    rpc.add_ModelMeshServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Node(registry, loader, transitions, rpc.ModelMeshStub(channel))
    await server.stop(None)
    await transitions.close()
    await loader.close()
    await registry.close()
