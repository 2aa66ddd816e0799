"""Serves gRPC health checks, with the List method that the library's servicer lacks."""

from __future__ import annotations  # grpcio-health-checking before 1.85 has no messages for List

from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1._async import HealthServicer


class Health:
    """The servicer. `set` changes the status of a service. With grpcio-health-checking before 1.85, List answers UNIMPLEMENTED."""

    def __init__(self) -> None:
        self._checks = HealthServicer()
        self._listed: dict[str, int] = {}
        self.Check = self._checks.Check
        self.Watch = self._checks.Watch

    async def set(self, service: str, status: int) -> None:
        self._listed[service] = status
        await self._checks.set(service, status)

    async def enter_graceful_shutdown(self) -> None:
        """Report every service as NOT_SERVING from now on, whatever `set` is given."""
        for service in self._listed:
            self._listed[service] = pb.HealthCheckResponse.NOT_SERVING
        await self._checks.enter_graceful_shutdown()

    async def List(
        self, request: pb.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.HealthListResponse:
        statuses = {name: pb.HealthCheckResponse(status=status) for name, status in self._listed.items()}
        return pb.HealthListResponse(statuses=statuses)
