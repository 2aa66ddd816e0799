"""The index of local files is read once for all callers and settings."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.model_key import ModelSettings, Quantization
from runtime.config.schema import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.puller.cache import Cache
from runtime.puller.checkpoint_check import CheckpointSummary, Policy, inspect
from runtime.puller.index_cache import IndexCache
from runtime.puller.metadata import Found, look_local
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama


class CountingReader:
    """Reads as `look_local` does, after `may_end` is set."""

    def __init__(self) -> None:
        self.identities: list[str] = []
        self.fails = False
        self.may_end = threading.Event()

    def __call__(self, found: CheckpointSummary) -> Found:
        self.identities.append(found.identity)
        assert self.may_end.wait(10)
        if self.fails:
            raise LoadFailed("damaged")
        return look_local(found)


def test_index_cache_reads_once_for_all_threads(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a")
    reader, found = CountingReader(), inspect(tmp_path / "a", Policy(False, False))
    cache = IndexCache(reader)
    with ThreadPoolExecutor(18) as threads:
        asked = [threads.submit(cache.get, found) for _ in range(18)]
        reader.may_end.set()
        results = [one.result() for one in asked]
    assert all(result is results[0] for result in results)
    assert cache.get(found) is results[0]
    assert len(reader.identities) == 1


def test_index_cache_reads_changed_files_and_failures_again(tmp_path: Path) -> None:
    reader = CountingReader()
    reader.may_end.set()
    cache, policy = IndexCache(reader), Policy(False, False)
    tiny_llama(tmp_path / "a")
    reader.fails = True
    with pytest.raises(LoadFailed):
        cache.get(inspect(tmp_path / "a", policy))
    reader.fails = False
    cache.get(inspect(tmp_path / "a", policy))
    (tmp_path / "a" / "config.json").write_text((tmp_path / "a" / "config.json").read_text() + "\n")
    cache.get(inspect(tmp_path / "a", policy))
    assert len(reader.identities) == 3
    assert len(set(reader.identities)) == 2


async def test_preparer_looks_with_other_settings_read_no_index_again(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a")
    reader = CountingReader()
    reader.may_end.set()
    config = RuntimeConfig(model_roots=(str(tmp_path),))
    preparer = CheckpointPreparer(config, Cache(tmp_path / "cache", 1 << 30), indexes=IndexCache(reader))
    settings = [
        ModelSettings(max_model_len=length, quantize=quantize)
        for length in (16, 32, 64)
        for quantize in (Quantization.NONE, Quantization.NF4)
    ]
    source = ModelSource(str(tmp_path / "a"))
    looks = await asyncio.gather(*(preparer.look(source, one, "cpu") for one in settings for _ in range(3)))
    assert len(reader.identities) == 1
    assert len({look.needs for look in looks}) == len(settings)
    preparer.close()
