"""A tiny checkpoint of each family, built, loaded and run, gives Hugging Face's own logits: fused where its shape is known, unfused otherwise."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.support.families import VOCAB
from tests.support.steps import bring_up, hf_logits, prompts, save
from tests.support.tiny_models import COMMON, assert_same, tiny

FUSED = ["llama", "qwen3", "gemma3", "granite", "mistral", "qwen2", "gemma2", "phi3", "glm"]
UNFUSED = ["gpt2", "neox", "phi", "mixtral", "gpt_oss", "smollm3"]


@pytest.mark.parametrize("name", FUSED + UNFUSED)
def test_logits_are_hugging_faces(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    resident = bring_up(save(model, tmp_path))
    assert resident.built.path.startswith("fused" if name in FUSED else "unfused"), resident.built.path
    asked = prompts(VOCAB, [33, 5, 18])
    assert_same(resident.logits(asked), hf_logits(model, asked))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_unfused_gives_the_same(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    resident = bring_up(save(model, tmp_path), fuse=False)
    assert resident.built.path == "unfused: fusing is switched off"
    asked = prompts(VOCAB, [33, 5, 18])
    assert_same(resident.logits(asked), hf_logits(model, asked))


def test_built_model_gives_logits_of_asked_rows_only(tmp_path: Path) -> None:
    model = tiny("llama")
    resident = bring_up(save(model, tmp_path))
    (prompt,) = prompts(VOCAB, [12])
    positions, context = resident.rows().step([(0, 0, 12)])
    with torch.inference_mode():
        logits = resident.built.forward(prompt, positions, torch.tensor([11, 3]), context)
    (wanted,) = hf_logits(model, [prompt])
    assert_same([logits], [wanted[[11, 3]]])


@pytest.mark.parametrize("fuse", [True, False])
def test_weights_leave_and_return(tmp_path: Path, fuse: bool) -> None:
    resident = bring_up(save(tiny("qwen3"), tmp_path), fuse=fuse)
    asked = prompts(VOCAB, [20, 9])
    before = resident.logits(asked)
    address = resident.memory.weights_view.data_ptr()
    resident.memory.evict()
    assert int(resident.memory.weights_view.count_nonzero()) == 0
    # other slabs this time: addresses stay all the same
    resident.memory.swap_in(range(100, 100 + resident.memory.weight_slabs))
    after = resident.logits(asked)
    assert resident.memory.swap_in_done()
    assert not resident.memory.pending
    assert resident.memory.weights_view.data_ptr() == address
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_built_model_runs_a_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    resident = bring_up(save(model, tmp_path))
    assert resident.built.dtype is torch.float32
    asked = prompts(VOCAB, [20])
    oracle = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(resident.logits(asked), hf_logits(oracle, asked))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    config = Qwen2Config(**COMMON, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[Qwen2Config](config).eval()
    resident = bring_up(save(model, tmp_path))
    names = [tensor.name for tensor in resident.blueprint.layout.tensors]
    assert "lm_head.weight" not in names
    assert resident.blueprint.num_parameters == sum(p.numel() for p in model.parameters())
    asked = prompts(VOCAB, [11])
    assert_same(resident.logits(asked), hf_logits(model, asked))
