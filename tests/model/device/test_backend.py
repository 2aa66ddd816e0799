"""The backend on a CPU: loads end in runners, or in errors that name the model and the sizes; what was cancelled leaves nothing."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.model_key import Quantization
from runtime.config.schema import EngineConfig
from runtime.engine.device.backend import EngineBackend, Loading, make_backend
from runtime.engine.interfaces import LoadRequest, LoadResult
from runtime.errors import Cancelled, LoadFailed
from tests.support.steps import save
from tests.support.tiny_models import tiny

SLAB = 256 * 1024


def backend(slabs: int = 64) -> EngineBackend:
    return make_backend(
        EngineConfig(
            device="cpu",
            slab_bytes=SLAB,
            device_budget_bytes=slabs * SLAB,
            max_rows=4,
            max_batch_tokens=64,
            num_threads=1,
        )
    )


def test_backend_load_returns_runner_and_memory(tmp_path: Path) -> None:
    made = backend()
    assert (made.device, made.total_slabs, made.slab_bytes, made.host_total_bytes) == ("cpu", 64, SLAB, 0)
    checkpoint = save(tiny("llama"), tmp_path)
    loaded = made.load(LoadRequest("m", checkpoint, 77)).result()
    facts = loaded.runner.facts
    assert (facts.model_id, facts.architecture, facts.path) == ("m", "LlamaForCausalLM", "fused: 3 layers")
    assert (facts.max_model_len, facts.dtype, facts.quantization) == (77, "float32", Quantization.NONE)
    assert loaded.memory.weight_slabs == -(-facts.weight_bytes // SLAB)
    assert facts.kv_bytes_per_token == loaded.memory.kv.bytes_per_token == 2 * 3 * 2 * 12 * 4
    assert loaded.memory.kv.max_slabs == 64
    loaded.memory.close()
    loaded.memory.close()
    made.close()


def test_backend_refuses_oversized_weights_with_sizes(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    with pytest.raises(
        LoadFailed,
        match=r"model big: it needs \d+ bytes for its weights .* the device budget is 262144 bytes \(1 slabs\)",
    ):
        backend(slabs=1).load(LoadRequest("big", checkpoint, None)).result()


def test_backend_refuses_slab_smaller_than_block(tmp_path: Path) -> None:
    made = make_backend(
        EngineConfig(device="cpu", slab_bytes=4096, device_budget_bytes=SLAB * 64, max_rows=4, max_batch_tokens=64)
    )
    with pytest.raises(LoadFailed, match=r"model m: one KV block of 16 tokens takes \d+ bytes, slab_bytes is 4096"):
        made.load(LoadRequest("m", save(tiny("llama"), tmp_path), None)).result()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 10**6}, r"model m: config\.json says 1000000 layers, the files hold \d+ tensors"),
        ({"num_hidden_layers": 0}, "0 layers and a vocabulary of"),
        ({"vocab_size": -5}, "a vocabulary of -5"),
        ({"vocab_size": 2**40}, r"model m: tensor \S+ has shape"),
        ({"hidden_size": 2**40}, r"model m: "),
        ({"num_attention_heads": 0}, r"model m: config\.json cannot be used"),
        ({"eos_token_id": [1, "a"]}, r"model m: config\.json cannot be used"),
        ({"model_type": ["llama"]}, r"model m: config\.json cannot be used"),
    ],
)
def test_backend_refuses_invalid_configuration(tmp_path: Path, change: dict[str, object], named: str) -> None:
    made = backend()
    checkpoint = save(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LoadFailed, match=named):
        made.load(LoadRequest("m", checkpoint, None)).result()
    made.close()


def test_backend_huge_context_reserves_no_memory(tmp_path: Path) -> None:
    made = backend()
    checkpoint = save(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 10**15}))
    loaded = made.load(LoadRequest("m", checkpoint, None)).result()
    loaded.memory.close()
    made.close()


def test_loading_cancelled_raises_cancelled(tmp_path: Path) -> None:
    made = backend()
    job = made.load(LoadRequest("m", save(tiny("llama"), tmp_path), None))
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    assert job.done()


def test_loading_finished_after_cancel_returns_model() -> None:
    """Graphs and the pool that they share are the engine thread's alone: a loading thread may not close a runner."""
    closed: list[str] = []

    def part(name: str) -> Any:
        return SimpleNamespace(close=lambda: closed.append(name))

    going, go = threading.Event(), threading.Event()
    made = LoadResult(part("runner"), part("memory"))

    def work(cancelled: threading.Event) -> LoadResult:
        going.set()
        assert go.wait(20)
        return made

    job = Loading(work)
    assert going.wait(20)
    job.cancel()
    go.set()
    assert job.result() is made
    assert closed == []


def test_make_backend_refuses_unknown_device_and_small_budget() -> None:
    with pytest.raises(ValueError, match="device meta is neither"):
        make_backend(EngineConfig(device="meta"))
    with pytest.raises(ValueError, match="less than one slab"):
        make_backend(EngineConfig(device="cpu", slab_bytes=SLAB, device_budget_bytes=100))
