"""What runs while weights come in: every likely size, in the model's own shapes, once a process, and never at a load's expense."""

import dataclasses
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig
from runtime.engine.model.buckets import Bucket, standard
from runtime.engine.model.build import Blueprint, draw
from runtime.engine.model.fuse_proof import Prover
from runtime.engine.model.geometry import kv_geometry
from runtime.engine.model.rehearsal import Rehearsal, Stage, _steps
from runtime.engine.model.runner import ModelRunner
from runtime.engine.plan import KvGeometry
from runtime.types import Checkpoint
from tests.support.families import family
from tests.support.steps import save

SLAB = 256 * 1024
CONFIG = EngineConfig(device="cpu", slab_bytes=SLAB, max_rows=8, max_batch_tokens=96)


def drawn(name: str, folder: Path) -> tuple[Blueprint, KvGeometry]:
    checkpoint: Checkpoint = save(family(name), folder)
    blueprint = draw("m", checkpoint, None, Prover(True), num_threads=1, min_group_bytes=1 << 20)
    return blueprint, kv_geometry("m", blueprint.shape, 16, blueprint.card.dtype.itemsize, SLAB, 16)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets that a twin was to run: the CPU's kernels know no padding."""
    asked: list[Bucket] = []

    def rehearse(runner: ModelRunner, bucket: Bucket) -> torch.Tensor:
        asked.append(bucket)
        return torch.zeros(0)

    monkeypatch.setattr(ModelRunner, "rehearse", rehearse)
    return asked


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_likely_size_runs_on_a_gpu(name: str, tmp_path: Path) -> None:
    blueprint, kv = drawn(name, tmp_path)
    with torch.inference_mode():
        assert len(list(_steps(blueprint, kv, blueprint.card.dtype, SLAB, torch.device("cuda"), CONFIG))) > 10


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_likely_size_runs_without_weights(name: str, tmp_path: Path, sizes: list[Bucket]) -> None:
    blueprint, kv = drawn(name, tmp_path)
    assert blueprint.spec is not None
    with torch.inference_mode():
        done = list(_steps(blueprint, kv, blueprint.card.dtype, SLAB, torch.device("cpu"), CONFIG))
    assert done[0] is False
    assert all(done[1:])
    assert len(done) == 3 + len(sizes)
    assert set(sizes) == {bucket.within(8, 96) for bucket in standard()}


@pytest.mark.usefixtures("sizes")
def test_models_of_one_shape_are_rehearsed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(torch.device("cpu"), CONFIG)
    blueprint, kv = drawn("llama", tmp_path)
    first = stage.begin(blueprint, kv, torch.float32, SLAB)
    assert first is not None
    first.finish()
    assert first.num_steps >= 2
    assert not stage.busy
    assert stage.begin(blueprint, kv, torch.float32, SLAB) is None
    other = stage.begin(blueprint, kv, torch.float16, SLAB)
    assert other is not None
    other.finish()
    assert stage.begin(dataclasses.replace(blueprint, spec=None), kv, torch.float32, SLAB) is None
    assert "ended early" not in caplog.text


def test_a_rehearsal_that_fails_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    def steps() -> "list[bool]":
        raise RuntimeError("no compiler")

    rehearsal = Rehearsal(lambda: iter(steps()), torch.device("cpu"))
    rehearsal.finish()
    assert rehearsal.over
    assert "a rehearsal ended early: RuntimeError: no compiler" in caplog.text
