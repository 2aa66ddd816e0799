"""What runs while weights come in: every likely size, in the model's own shapes, once a process, and never at a load's expense."""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtime.config.schema import EngineConfig
from runtime.engine.interfaces import Bucket, KvGeometry
from runtime.engine.model.build.builder import Blueprint, draw
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.build.warmup import Warmup, Warmups
from runtime.engine.model.run.buckets import standard
from runtime.engine.model.run.fused_stack import FusedStack
from runtime.engine.model.run.kv_geometry import kv_geometry
from runtime.engine.model.run.runner import ModelRunner
from runtime.types import Checkpoint
from tests.support.families import family
from tests.support.steps import save

SLAB = 256 * 1024
CONFIG = EngineConfig(device="cpu", slab_bytes=SLAB, max_rows=8, max_batch_tokens=96)


def drawn(name: str, folder: Path) -> tuple[Blueprint, KvGeometry]:
    checkpoint: Checkpoint = save(family(name), folder)
    blueprint = draw("m", checkpoint, None, EquivalenceChecker(True), num_threads=1, min_group_bytes=1 << 20)
    return blueprint, kv_geometry("m", blueprint.shape, 16, blueprint.card.dtype.itemsize, SLAB, 16)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets that a twin was to run: the CPU's kernels know no padding."""
    asked: list[Bucket] = []

    def run_padded(runner: ModelRunner, bucket: Bucket) -> torch.Tensor:
        asked.append(bucket)
        return torch.zeros(0)

    monkeypatch.setattr(ModelRunner, "run_padded", run_padded)
    return asked


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_warmup_runs_every_likely_size_on_a_gpu(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blueprint, kv = drawn(name, tmp_path)
    stage = Warmups(torch.device("cuda", 0), CONFIG)
    for warmup in (stage.open(), stage.begin(blueprint, kv, blueprint.card.dtype, SLAB)):
        assert warmup is not None
        warmup.finish()
        assert warmup.num_steps >= 4
    assert "ended early" not in caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_warmup_runs_every_likely_size(
    name: str, tmp_path: Path, sizes: list[Bucket], caplog: pytest.LogCaptureFixture
) -> None:
    blueprint, kv = drawn(name, tmp_path)
    warmup = Warmups(torch.device("cpu"), CONFIG).begin(blueprint, kv, blueprint.card.dtype, SLAB)
    assert warmup is not None
    warmup.finish()
    assert "ended early" not in caplog.text
    assert warmup.num_steps == 1 + len(sizes)
    assert set(sizes) == {bucket.within(8, 96) for bucket in standard()}


@pytest.mark.usefixtures("sizes")
def test_warmup_keeps_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine collects its garbage rarely, and the zeros are as large as the largest weight."""
    made: list[weakref.ref[FusedStack]] = []

    def tracked(*arguments: Any) -> FusedStack:
        stack = FusedStack(*arguments)
        made.append(weakref.ref(stack))
        return stack

    monkeypatch.setattr("runtime.engine.model.build.warmup.FusedStack", tracked)
    blueprint, kv = drawn("llama", tmp_path)
    gc.disable()
    try:
        begun = Warmups(torch.device("cpu"), CONFIG).begin(blueprint, kv, blueprint.card.dtype, SLAB)
        assert begun is not None
        begun.finish()
        assert len(made) == 2
        assert not any(twin() for twin in made)
    finally:
        gc.enable()


def test_warmup_runs_shared_kernels_once(sizes: list[Bucket], caplog: pytest.LogCaptureFixture) -> None:
    warmup = Warmups(torch.device("cpu"), CONFIG).open()
    warmup.finish()
    assert warmup.num_steps == 4 + len(sizes)  # sampled and masked answers with and without sorting
    assert set(sizes) == {bucket.within(8, 96) for bucket in standard()}
    assert "ended early" not in caplog.text


@pytest.mark.usefixtures("sizes")
def test_warmup_runs_once_per_shape(tmp_path: Path) -> None:
    stage = Warmups(torch.device("cpu"), CONFIG)
    blueprint, kv = drawn("llama", tmp_path)
    first = stage.begin(blueprint, kv, torch.float32, SLAB)
    assert first is not None
    first.wait()
    first.finish()
    assert not stage.busy
    assert stage.begin(blueprint, kv, torch.float32, SLAB) is first
    other = stage.begin(blueprint, kv, torch.float16, SLAB)
    assert other is not None
    assert other is not first
    other.finish()
    assert stage.begin(dataclasses.replace(blueprint, spec=None), kv, torch.float32, SLAB) is None


def test_load_waits_for_the_largest_prompt(tmp_path: Path, sizes: list[Bucket]) -> None:
    blueprint, kv = drawn("llama", tmp_path)
    config = msgspec.structs.replace(CONFIG, max_batch_tokens=512)
    warmup = Warmups(torch.device("cpu"), config).begin(blueprint, kv, torch.float32, SLAB)
    assert warmup is not None
    warmup.finish()
    prompts = [bucket.num_tokens for bucket in sizes if bucket.max_query_len > 1]
    assert prompts[0] == 256
    assert prompts[0] != max(prompts), "larger prompts come later"


def test_warmup_knows_the_sizes_that_it_has_run() -> None:
    first, second, never = (Bucket(tokens, 1, tokens, 1024) for tokens in (256, 128, 64))
    may_end = threading.Event()

    def steps() -> Iterator[Bucket | None]:
        yield None
        yield first
        may_end.wait(60)
        yield second

    warmup = Warmup([steps], torch.device("cpu"))
    warmup.wait()
    assert warmup.has_run(first)
    assert not warmup.has_run(second)
    may_end.set()
    warmup.finish()
    assert warmup.has_run(second)
    assert warmup.has_run(never), "no step of it will come"


def test_warmups_compile_for_a_model_what_both_of_its_warmups_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    small = Bucket(16, 8, 16, 4194304)

    def run_padded(runner: ModelRunner, bucket: Bucket) -> torch.Tensor:
        if bucket == small:
            may_end.wait(60)
        return torch.zeros(0)

    stage = Warmups(torch.device("cpu"), CONFIG)
    blueprint, kv = drawn("llama", tmp_path)
    monkeypatch.setattr(ModelRunner, "run_padded", lambda runner, bucket: torch.zeros(0))
    stage.open().finish()
    monkeypatch.setattr(ModelRunner, "run_padded", run_padded)
    own = stage.begin(blueprint, kv, torch.float32, SLAB)
    assert own is not None
    own.wait()
    largest = Bucket(64, 8, 64, 4194304)
    assert stage.has_compiled(own, largest)
    assert not stage.has_compiled(own, small)
    assert not stage.has_compiled(None, largest), "a model without a warmup waits for all of them"
    may_end.set()
    own.finish()
    assert stage.has_compiled(own, small)
    assert stage.has_compiled(None, largest)


def test_warmup_failure_blocks_no_load(caplog: pytest.LogCaptureFixture) -> None:
    def steps() -> Iterator[Bucket | None]:
        raise RuntimeError("no compiler")

    warmup = Warmup([steps], torch.device("cpu"))
    warmup.wait()
    warmup.finish()
    assert warmup.over
    assert "a warmup ended early: RuntimeError: no compiler" in caplog.text
