"""Pods that several modules of this folder call."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.envoy import MODES, loaded_in
from tests.support.pods import RunningPod, running_pod


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    """A pod that knows the model `m`, which is not loaded."""
    async with running_pod(tmp_path / "pod", failure_expiry_s=0.2) as running:
        await running.register("m")
        yield running


@pytest.fixture(params=MODES)
async def either(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    """A pod with a loaded model, which its callers reach directly, through Envoy or through workers."""
    async with loaded_in(request.param, tmp_path / "pod", failure_expiry_s=0.2) as running:
        yield running
