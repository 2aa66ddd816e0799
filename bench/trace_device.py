"""Serves traces with a real engine process, in real time: its checkpoints, its budgets and the answers as they come over its socket.

One checkpoint is written per kind. Each model has a folder of links to its kind's files, because the engine keeps one host image for equal paths.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bench.checkpoints import SHAPES, write
from bench.packed import checkpoint_of, random_packed
from bench.simulated_device import SLAB_BYTES, SimulatedModel
from bench.trace_outcome import Outcome, Served
from bench.trace_simulated import make_request
from bench.trace_workload import Request
from common.model_state import ModelFigures, Tier
from common.units import GIB, MIB
from runtime.engine.memory.free_memory import free_bytes
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, engine

_CPU_SLAB_BYTES = 1 * MIB
_LOADS_AT_ONCE = 2  # the runtime's default
_STATS_S = 1.5  # within which the engine sends its figures
_MOST_HOST_BYTES = 130 * GIB
_OTHER_HOST_BYTES = 30 * GIB  # the processes, and the pages of the checkpoints' files


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes of device and host memory for weights and KV, in slabs of `slab_bytes`."""

    device_bytes: int
    host_bytes: int
    slab_bytes: int


def choose_budgets(device: str, device_gib: float, host_gib: float) -> Budgets:
    """`host_gib` 0: 130 GiB, or what is free less 30 GiB. A CPU has no host tier."""
    if device == "cpu":
        return Budgets(int(device_gib * GIB), 0, _CPU_SLAB_BYTES)
    host_bytes = int(host_gib * GIB) or min(_MOST_HOST_BYTES, free_bytes() - _OTHER_HOST_BYTES)
    return Budgets(int(device_gib * GIB), host_bytes, SLAB_BYTES)


def write_checkpoints(models: Mapping[str, SimulatedModel], folder: Path, device: str) -> dict[str, Checkpoint]:
    """Write one checkpoint per kind, unless it exists, and return a checkpoint of each model that links to it."""
    kinds = {model.kind: model for model in models.values()}
    written = {kind: _write(model, folder, device) for kind, model in kinds.items()}
    return {model_id: _link(written[model.kind], folder / "models" / model_id) for model_id, model in models.items()}


class DeviceEngine:
    """An engine process with all models loaded. `vocab`: the smallest vocabulary of its models."""

    def __init__(self, running: Engine, vocab: int) -> None:
        self._running = running
        self._vocab = vocab
        self._rng = np.random.default_rng(1)

    @property
    def tiers(self) -> dict[Tier, int]:
        """How many models' weights are on the device, and in which tier the others are."""
        counts = dict.fromkeys((Tier.DEVICE, Tier.HOST, Tier.DISK), 0)
        for figures in self._figures().values():
            counts[figures.tier] += 1
        return counts

    def serve(self, trace: Sequence[Request], timeout_s: float = 300) -> Outcome:
        """Serve a trace in real time, until the last request has ended."""
        before = self._figures()
        resident = frozenset(model_id for model_id, figures in before.items() if figures.tier is Tier.DEVICE)
        asked = [(one.at_s, one.model_id, make_request(one, self._rng, self._vocab)) for one in trace]
        answers = self._running.replay(asked, timeout_s)
        served = [
            Served(request, answer.tier, answer.first_s, answer.end_s, answer.error)
            for request, answer in zip(trace, answers, strict=True)
        ]
        after = self._figures()
        copied_bytes = sum(
            (figures.swap_ins_total - before[model_id].swap_ins_total) * figures.weight_bytes
            for model_id, figures in after.items()
        )
        return Outcome(served, copied_bytes, max(one.end_s for one in served), resident)

    def _figures(self) -> dict[str, ModelFigures]:
        self._running.wait_idle(_STATS_S)
        stats = self._running.stats
        if stats is None:
            raise RuntimeError("the engine has sent no figures")
        return {figures.model_id: figures for figures in stats.models}


@contextlib.contextmanager
def device_engine(
    models: Mapping[str, SimulatedModel], checkpoints: Mapping[str, Checkpoint], budgets: Budgets, device: str
) -> Iterator[DeviceEngine]:
    """Start an engine, load all models, and end it with the block. Raises RuntimeError for a model that does not load."""
    config = {
        "device": device,
        "slab_bytes": budgets.slab_bytes,
        "device_budget_bytes": budgets.device_bytes,
        "host_budget_bytes": budgets.host_bytes,
        "host_kv_bytes": 0,  # no two prompts of a trace begin alike
        "oversubscribe": "disk",
    }
    with engine(config) as running:
        running.load_all(checkpoints, _LOADS_AT_ONCE)
        yield DeviceEngine(running, min(model.shape.vocab for model in models.values()))


def _write(model: SimulatedModel, folder: Path, device: str) -> Checkpoint:
    shape = SHAPES[model.shape.name]
    if device != "cpu" and model.format != "bf16":
        return random_packed(shape, model.format, folder)
    return checkpoint_of(write(shape, folder / f"{shape.name}-0"), model.format, folder)


def _link(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint over paths of its own, symbolic links in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {Path(file) for file in (*checkpoint.weight_files, *(file for file in (checkpoint.packed_file,) if file))}
    sources |= {path for path in Path(checkpoint.model_dir).iterdir() if path.is_file()}
    for source in sources:
        link = folder / source.name
        if not link.is_symlink() or link.readlink() != source:
            link.unlink(missing_ok=True)
            link.symlink_to(source)

    def linked(file: str) -> str:
        return str(folder / Path(file).name)

    return msgspec.structs.replace(
        checkpoint,
        model_dir=str(folder),
        weight_files=tuple(linked(file) for file in checkpoint.weight_files),
        packed_file=linked(checkpoint.packed_file) if checkpoint.packed_file else None,
    )
