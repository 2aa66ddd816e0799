"""Health checks with an older release of grpcio-health-checking."""

import importlib.util

import pytest
from grpc_health.v1 import health_pb2

from common.grpc import health


def test_health_can_be_imported_without_the_messages_of_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(health_pb2, "HealthListRequest")  # as before 1.85
    monkeypatch.delattr(health_pb2, "HealthListResponse")
    spec = importlib.util.spec_from_file_location("health_with_older_library", health.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Health().Check is not None
