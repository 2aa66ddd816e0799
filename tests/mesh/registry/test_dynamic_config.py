"""ModelMesh's dynamic settings, over the embedded store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.errors import Unavailable
from mesh.registry.dynamic_config import DynamicConfig
from mesh.store.embedded import EmbeddedStore
from tests.support.waiting import until

PREFIX = "/mm/repertory/config/"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(tmp_path)
    await store.open()
    yield store
    await store.close()


async def test_dynamic_config_applies_each_change_once(store: EmbeddedStore) -> None:
    await store.put(f"{PREFIX}logger_level", b"DEBUG")
    applied: list[str | None] = []
    running = asyncio.create_task(DynamicConfig(store, PREFIX, {"logger_level": applied.append}).run())
    await until(lambda: applied == ["DEBUG"])
    await store.put(f"{PREFIX}logger_level", b"DEBUG")
    await store.put(f"{PREFIX}other", b"1")
    await store.put(f"{PREFIX}logger_level", b"INFO")
    await store.delete(f"{PREFIX}logger_level")
    await until(lambda: applied == ["DEBUG", "INFO", None])
    running.cancel()


async def test_dynamic_config_logs_a_setting_without_effect(
    store: EmbeddedStore, caplog: pytest.LogCaptureFixture
) -> None:
    await store.put(f"{PREFIX}scaleup_rpm_threshold", b"2000")
    running = asyncio.create_task(DynamicConfig(store, PREFIX, {}).run())
    await until(lambda: "scaleup_rpm_threshold has no effect" in caplog.text)
    running.cancel()


@pytest.mark.parametrize(("value", "is_disabled"), [(b"true", True), (b"", True), (b"false", False)])
async def test_dynamic_config_disable_keeps_pods_from_starting(
    store: EmbeddedStore, value: bytes, is_disabled: bool
) -> None:
    config = DynamicConfig(store, PREFIX, {})
    await config.check_enabled()
    await store.put(f"{PREFIX}disable", value)
    if is_disabled:
        with pytest.raises(Unavailable, match=f"{PREFIX}disable"):
            await config.check_enabled()
    else:
        await config.check_enabled()
