"""The whole engine over a GPU's memory without a GPU: loop, loads in threads, residency, idle turns and graphs of real models, on stand-ins for the
driver's memory and events. Numbers are computed on the CPU at once, and a graph's replay computes its pass again; texts are transformers' own."""

import dataclasses
import queue
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.config.schema import EngineConfig
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.loop import EngineLoop
from runtime.engine.device import cuda
from runtime.engine.device.backend import EngineBackend
from runtime.engine.device.cuda import CudaDevice
from runtime.engine.kernels.attention import paged_attention
from runtime.engine.kernels.rope import rope_and_cache
from runtime.engine.model.run import attention
from runtime.engine.model.run.cuda_graphs import GraphPool, StepGraph
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.input_buffers import InputRing
from runtime.ipc.messages import Add, Command, Event, Load, LoadFailed, Tokens, Unload
from runtime.types import GenerationRequest, SamplingParams, StopParams
from tests.support.cuda_device import Device
from tests.support.oracle import prompts, reference
from tests.support.steps import save
from tests.support.tiny_models import tiny

SLAB = 64 * 1024
SLABS = 14  # two of the three models and little KV
CONFIG = EngineConfig(
    device="cuda",
    slab_bytes=SLAB,
    device_budget_bytes=SLABS * SLAB,
    host_budget_bytes=11 * SLAB,
    max_rows=6,
    max_batch_tokens=64,
    oversubscribe="disk",
    debug_checks=True,
)


class RecomputingPool(GraphPool):
    """Takes a pass for a graph: to replay it is to run it again."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), enabled=False)
        self.enabled = True
        self.records = 0
        self.replays = 0

    def record(self, run: Callable[[], torch.Tensor]) -> StepGraph:
        self.records += 1
        logits = run().clone()

        def replay() -> None:
            self.replays += 1
            logits.copy_(run())

        return StepGraph(cast("torch.cuda.CUDAGraph", SimpleNamespace(replay=replay)), logits)


def state_of_a_gpu(config: EngineConfig, graphs: GraphPool) -> DeviceState:
    """A CPU's state, with graphs and with uploads that the device sees only once they are sent."""
    cpu = torch.device("cpu")
    uploads = InputRing(cpu, config.max_batch_tokens, config.max_rows, 64, staged=True)
    return dataclasses.replace(DeviceState.create(cpu, config), graphs=graphs, uploads=uploads)


def use_the_gpus_twins(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Attention as a GPU's kernels have it, which are handed no pointer that the driver does not know: the CPU's own knows no padding."""

    def attend(
        host: Any,
        planes: Any,
        block_tokens: int,
        spec: Any,
        q: torch.Tensor,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        assert not any(device.drivers[-1].refuses(plane.data_ptr()) for plane in (planes.k, planes.v)), (
            "Triton would refuse the pointer"
        )
        paged_attention(
            out, q, planes.k, planes.v, planes.page_unit, *host.tables, block_tokens=block_tokens, num_kv_heads=spec.num_kv_heads, scale=spec.scale,
            max_query_len=0, max_context_len=0, sliding_window=spec.sliding_window, softcap=spec.softcap, sinks=sinks,
        )  # fmt: skip

    def rope_write(
        qkv: torch.Tensor, cos: Any, sin: Any, slots: Any, planes: Any, spec: Any, rope: Any, q_norm: Any, k_norm: Any
    ) -> torch.Tensor:
        q = torch.zeros((qkv.shape[0], spec.num_q_heads, spec.head_dim), dtype=qkv.dtype)
        rope_and_cache(
            q, qkv, cos, sin, slots, planes.k, planes.v, num_q_heads=spec.num_q_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            rotary_dim=rope.rotary_dim, interleaved=rope.interleaved, q_norm=q_norm, k_norm=k_norm, norm_eps=rope.norm_eps,
            norm_plus_one=rope.norm_plus_one,
        )  # fmt: skip
        return q

    monkeypatch.setattr(attention, "AttentionPlan", lambda *tables: SimpleNamespace(tables=tables[:-1]))
    monkeypatch.setattr(attention, "attend_on_host", attend)
    monkeypatch.setattr(attention, "rope_write_on_host", rope_write)


class Stage:
    """An engine, turned by hand; the device does some of its work after each turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rng = random.Random(seed)
        self.device = Device(seed)
        self.device.install(monkeypatch)
        for name, stand_in in {
            "mem_get_info": lambda *_: (1 << 40, 1 << 40),
            "get_device_name": lambda *_: "stand-in",
            "synchronize": lambda *_: self.drain(),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(cuda, "_GROUP_BYTES", 1)
        use_the_gpus_twins(monkeypatch, self.device)
        self.pool = RecomputingPool()
        self.backend = EngineBackend(CONFIG, CudaDevice(torch.device("cpu"), CONFIG), state_of_a_gpu(CONFIG, self.pool))
        self.inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.events: list[Event] = []
        self.loop = EngineLoop(CONFIG, self.backend, self.inbox, self.events.append, lambda _: None, time.monotonic)
        self.seen: dict[int, LoadedModel] = {}  # also those that were unloaded since
        self.texts: dict[int, list[int]] = {}
        self.ended: set[int] = set()

    def drain(self) -> None:
        while self.device.advance():
            pass

    def turn(self) -> None:
        if not self.loop.turn() and not self.loop.idle():
            time.sleep(0.001)
        self.seen |= {id(model): model for model in self.loop.table.models.values()}
        for _ in range(self.rng.randrange(12)):
            self.device.advance()

    def until(self, done: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline_s, "nothing comes any more"
            self.turn()
            self.read()

    def read(self) -> None:
        for event in self.events:
            assert not isinstance(event, LoadFailed) or event.code == "CANCELLED", event
            for row in event.rows if isinstance(event, Tokens) else ():
                assert row.error is None, row.error
                self.texts[row.request_id] += row.tokens
                if row.finish is not None:
                    self.ended.add(row.request_id)
        self.events.clear()

    def ask(self, number: int, model_id: str, prompt: list[int], count: int) -> None:
        self.texts[number] = []
        stop = StopParams(max_tokens=count, ignore_eos=True)
        request = GenerationRequest(prompt=tuple(prompt), sampling=SamplingParams(temperature=0.0), stop=stop)
        self.inbox.put(Add(number, model_id, request))

    def has_loaded(self, name: str) -> bool:
        return self.loop.num_loading == 0 and name in self.loop.table.models

    def close(self) -> None:
        self.inbox.put(None)
        self.loop.run()
        self.drain()
        self.backend.close()
        driver = self.device.drivers[-1]
        assert (driver.num_mapped, driver.num_reserved, driver.handles) == (0, 0, {})


@pytest.mark.parametrize("seed", range(2))
def test_cuda_engine_swapped_models_match_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """More models than fit: they are loaded, captured without KV in idle turns, evicted, brought back, unloaded amid a load, and loaded again."""
    names = ("llama", "qwen3", "gemma3")
    models = {name: tiny(name) for name in names}
    checkpoints = {name: save(model, tmp_path / name) for name, model in models.items()}
    made = Stage(monkeypatch, seed)
    for name in names:
        made.inbox.put(Load(name, checkpoints[name]))
    made.until(lambda: len(made.loop.table.models) == len(names))
    for _ in range(30):
        made.turn()  # there are no requests yet
    assert made.pool.records > 0
    number, expected = 0, {}
    for _ in range(4):
        for prompt in prompts(seed + number, 5):
            name = made.rng.choice(names)
            expected[number] = reference(models[name], prompt, 10)
            made.ask(number, name, prompt, 10)
            number += 1
        made.until(lambda: len(made.ended) == len(expected))
        gone = made.rng.choice(names)
        made.inbox.put(Unload(gone))
        made.inbox.put(Load(gone, checkpoints[gone]))
        if made.rng.random() < 0.5:  # and once more, while that one comes
            made.inbox.put(Unload(gone))
            made.inbox.put(Load(gone, checkpoints[gone]))
        made.turn()
        made.until(partial(made.has_loaded, gone))
    assert {at: made.texts[at] for at in expected} == expected
    assert made.pool.replays > 0
    assert "without CUDA graphs" not in caplog.text
    assert sum(model.evictions for model in made.seen.values()) > 0
    made.close()
