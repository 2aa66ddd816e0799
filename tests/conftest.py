"""Fixtures that several areas share: a real etcd. Chooses Triton's interpreter where there is no GPU, before any test imports triton."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.etcd import EtcdServer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton's own library is imported, by whichever module comes first


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Shared: tests keep to prefixes of their own, and don't kill it."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One test's own, to be killed and brought back."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()
