"""Several ranks on a CPU give transformers' greedy text: by family, over quantised weights, under preemption, and after eviction and return."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from common.model_key import ModelSettings, Quantization
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.puller.checkpoint_check import Policy, inspect
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.sizing import geometry_of, needs_of
from runtime.types import Checkpoint, GenerationRequest, LogprobParams, ModelFacts, SamplingParams, StopParams
from tests.support.engine_process import Engine, engine
from tests.support.families import family
from tests.support.gguf_files import write_llama
from tests.support.llama_checkpoints import tiny_llama
from tests.support.oracle import prompts, reference

pytestmark = pytest.mark.slow

CONFIG = {"device": "cpu", "max_rows": 16, "max_batch_tokens": 64, "slab_bytes": 1 << 20, "num_threads": 1}


def config(ranks: int, budget_slabs: int = 64, **more: object) -> dict[str, object]:
    return {**CONFIG, "tensor_parallel": ranks, "device_budget_bytes": budget_slabs << 20, **more}


def saved(name: str, folder: Path, seed: int = 0) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts, and transformers' greedy texts of 24 tokens."""
    model = family(name, seed)
    model.save_pretrained(folder)
    asked = prompts(3 + seed, 4)
    files = tuple(map(str, folder.glob("*.safetensors")))
    return Checkpoint(str(folder), files, dtype="float32"), asked, [reference(model, one, 24) for one in asked]


@pytest.fixture(scope="module")
def pair() -> Iterator[Engine]:
    """Two ranks, which several tests load their models on."""
    with engine(config(2)) as running:
        yield running


@contextmanager
def loaded(running: Engine, model_id: str, checkpoint: Checkpoint) -> Iterator[ModelFacts]:
    yield running.load(model_id, checkpoint)[0].facts
    running.unload(model_id)


def texts(running: Engine, model_id: str, asked: list[list[int]]) -> list[list[int]]:
    return running.texts([(model_id, np.array(one, np.int32)) for one in asked], 24)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama", 2),
        ("qwen3", 2),
        ("gemma3", 2),
        ("granite", 2),
        # the base of the adapters' test on four ranks is this one
        pytest.param("qwen3", 4, id="one KV head on four ranks", marks=pytest.mark.long),
    ],
)
def test_text_of_several_ranks_equals_transformers(name: str, ranks: int, pair: Engine, tmp_path: Path) -> None:
    checkpoint, asked, expected = saved(name, tmp_path)
    with ExitStack() as stack:
        running = pair if ranks == 2 else stack.enter_context(engine(config(ranks)))
        facts = stack.enter_context(loaded(running, name, checkpoint))
        assert texts(running, name, asked) == expected
        # Long prompts are computed in chunks, and their second use hits the prefix cache.
        assert texts(running, name, asked) == expected
    assert facts.path.startswith("fused")


@pytest.fixture(scope="module")
def single() -> Iterator[Engine]:
    """One rank, whose texts are those that several must give."""
    with engine(config(1)) as running:
        yield running


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP8])
def test_quantised_weights_on_two_ranks_give_the_text_of_one(
    quantization: Quantization, single: Engine, pair: Engine, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "m", hidden=256)
    files = tuple(map(str, (tmp_path / "m").glob("*.safetensors")))
    (tmp_path / "out").mkdir()
    request = PackRequest("safetensors", str(tmp_path / "m"), files, str(tmp_path / "out"), "test", quantization)
    pack(request, lambda event: None)
    checkpoint = Checkpoint(str(tmp_path / "out"), (), str(tmp_path / "out" / PACKED_NAME), quantization, "float32")
    found = []
    for running in (single, pair):
        with loaded(running, quantization.value, checkpoint):
            found.append(texts(running, quantization.value, prompts(5, 3)))
    assert found[0] == found[1]


def test_kept_gguf_blocks_on_two_ranks_give_the_text_of_one(single: Engine, pair: Engine, tmp_path: Path) -> None:
    """The values of the first layer and the down projections of the second are stored in another type than the rest."""
    model = tiny_llama(tmp_path / "m", hidden=256)
    others = {"blk.0.attn_v": GGMLQuantizationType.Q8_0, "blk.1.ffn_down": GGMLQuantizationType.IQ4_NL}
    write_llama(model, tmp_path / "m.gguf", blocks=lambda name: others.get(name, GGMLQuantizationType.Q4_0))
    (tmp_path / "out").mkdir()
    pack(
        PackRequest(
            "gguf", str(tmp_path), (str(tmp_path / "m.gguf"),), str(tmp_path / "out"), "test", keep_blocks=True
        ),
        lambda event: None,
    )
    checkpoint = Checkpoint(
        str(tmp_path / "out"), (), str(tmp_path / "out" / PACKED_NAME), Quantization.NONE, "float32"
    )
    found = []
    for running in (single, pair):
        with loaded(running, "gguf", checkpoint):
            found.append(texts(running, "gguf", prompts(5, 3)))
    assert found[0] == found[1]


def test_logprobs_and_drawn_tokens_of_two_ranks_are_those_of_one(single: Engine, pair: Engine, tmp_path: Path) -> None:
    """Each rank has the logits of a part of the vocabulary, whose 193 tokens do not divide evenly. Masks and filters see them all."""
    checkpoint, asked, _ = saved("llama", tmp_path)
    sampling = SamplingParams(
        temperature=1.0, top_k=40, seed=7, logit_bias=((5, 2.0), (190, 2.0)), repetition_penalty=1.2
    )
    requests = [
        GenerationRequest(
            prompt=tuple(prompt),
            sampling=drawn,
            stop=StopParams(max_tokens=16, ignore_eos=True),
            logprobs=LogprobParams(5, 3),
        )
        for prompt in asked
        for drawn in (sampling, SamplingParams(temperature=0.0, allowed_token_ids=(3, 96, 97, 192)))
    ]
    found = []
    for running in (single, pair):
        with loaded(running, "m", checkpoint):
            found.append(running.rows("m", requests))
    for of_one, of_two in zip(*found, strict=True):
        assert [token for row in of_one for token in row.tokens] == [token for row in of_two for token in row.tokens]
        for one, two in zip(_scores(of_one), _scores(of_two), strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
            assert (one.rank, [token for token, _ in one.top]) == (two.rank, [token for token, _ in two.top])


def _scores(rows: list[RowTokens]) -> list[TokenLogprobs]:
    """The log-probabilities of the generated tokens, and of the prompt's but the first."""
    return [one for row in rows for one in (*(row.logprobs or ()), *(row.prompt_logprobs or ())) if one is not None]


def test_output_projection_is_divided(single: Engine, pair: Engine, tmp_path: Path) -> None:
    """Llama's is a tensor of its own. Gemma's is tied to the embeddings, which every rank has whole."""
    saving = {}
    for name in ("llama", "gemma3"):
        checkpoint, _, _ = saved(name, tmp_path / name)
        sizes = []
        for running in (single, pair):
            with loaded(running, name, checkpoint) as facts:
                sizes.append(facts.weight_bytes)
        saving[name] = sizes[0] / sizes[1]
    assert saving["llama"] > saving["gemma3"] > 1


def test_sizes_are_predicted_per_rank(pair: Engine, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    found = inspect(tmp_path, Policy())
    needs = needs_of(geometry_of(found.config), found.tensors, ModelSettings(), "cpu", num_devices=2)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, found.weight_files)), dtype="float32")
    with loaded(pair, "sized", checkpoint) as facts:
        pass
    assert facts.kv_bytes_per_token == needs.kv_bytes_per_token
    padding = 256 * (len(found.tensors) + 1)  # each tensor is aligned to 256 bytes
    assert needs.weight_bytes <= facts.weight_bytes <= needs.weight_bytes + padding


@pytest.mark.long  # that of saved KV evicts and returns models, too
def test_sharded_models_are_evicted_and_return(tmp_path: Path) -> None:
    first, asked, expected = saved("llama", tmp_path / "a")
    second, asked_of_second, expected_of_second = saved("llama", tmp_path / "b", seed=1)
    with engine(config(2, budget_slabs=3, oversubscribe="disk", slab_bytes=1 << 18)) as running:
        running.load("a", first)
        running.load("b", second)
        for _ in range(2):
            assert texts(running, "a", asked) == expected
            assert texts(running, "b", asked_of_second) == expected_of_second


def test_rows_with_a_mask_and_allowed_tokens_run_on_all_ranks(pair: Engine, tmp_path: Path) -> None:
    """Each rank takes the tokens that are not allowed out of the masks that rank 0 has computed."""
    checkpoint, asked, _ = saved("llama", tmp_path)
    sampling = SamplingParams(temperature=0.0, allowed_token_ids=tuple(range(20, 40)))
    stop = StopParams(max_tokens=8, ignore_eos=True)
    requests = [
        GenerationRequest(prompt=tuple(one), sampling=sampling, stop=stop, bad_words=((20,), (21, 22))) for one in asked
    ]
    with loaded(pair, "limited", checkpoint):
        timeline = pair.run([("limited", request) for request in requests], timeout_s=60)
    assert timeline.tokens == 8 * len(requests)


def test_model_that_only_fits_divided_loads(single: Engine, tmp_path: Path) -> None:
    checkpoint, asked, expected = saved("llama", tmp_path)
    weight_bytes = sum(Path(file).stat().st_size for file in checkpoint.weight_files)
    checkpoint = msgspec.structs.replace(checkpoint, weight_bytes=weight_bytes)
    with loaded(single, "m", checkpoint) as alone:
        on_one = alone.weight_bytes
    budget = weight_bytes * 9 // 10
    with engine(config(2, slab_bytes=1 << 14) | {"device_budget_bytes": budget}) as running:
        facts = running.load("m", checkpoint, max_model_len=128)[0].facts
        assert facts.weight_bytes < budget < on_one
        assert texts(running, "m", asked) == expected


def test_saved_kv_returns_on_all_ranks(tmp_path: Path) -> None:
    """Followers save and restore their heads' part of the blocks by rank 0's operations."""
    models = {name: saved("llama", tmp_path / name, seed) for seed, name in enumerate("ab")}
    settings = config(2, oversubscribe="disk", slab_bytes=1 << 18, host_kv_bytes=8 << 20)
    with engine({**settings, "device_budget_bytes": 3 << 18}) as running:
        for name, (checkpoint, _, _) in models.items():
            running.load(name, checkpoint)
        for _ in range(3):
            for name, (_, asked, expected) in models.items():
                assert texts(running, name, asked) == expected
        running.wait_idle(1.5)
        assert running.stats is not None
        assert all(model.kv_restored_blocks_total > 0 for model in running.stats.models)


def test_load_fails_on_all_ranks_and_leaves_the_engine_running(pair: Engine, tmp_path: Path) -> None:
    good, asked, expected = saved("llama", tmp_path / "good")
    undivided, _, _ = saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(RuntimeError, match="GPT2Config has no intermediate_size, so it cannot be divided"):
        pair.load("gpt2", undivided)
    with loaded(pair, "good", good):
        assert texts(pair, "good", asked) == expected


def test_heads_that_do_not_divide_are_named(pair: Engine, tmp_path: Path) -> None:
    tiny_llama(tmp_path, hidden=48, heads=3)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    with pytest.raises(RuntimeError, match="3 attention heads, which 2 devices"):
        pair.load("odd", checkpoint)
