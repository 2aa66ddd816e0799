"""Matrices in oneDNN's order: the products of rows as they lie, in the same bytes, at every return; what cannot be ordered stays in rows."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PhiConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from runtime.engine.model.cpu.linear import multiply
from runtime.engine.model.cpu.onednn_layout import OneDnnLayout
from tests.support.steps import bring_up, hf_logits, prompts, save
from tests.support.tiny_models import assert_same

VOCAB = 256
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": VOCAB,
}
# Llama runs fused; Phi unfused, as its own modules
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "unfused": PhiConfig(**SIZES, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def order() -> OneDnnLayout:
    found = OneDnnLayout.create()
    if found is None:
        pytest.skip("this machine's torch does not order matrices")
    return found


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[name])](CONFIGS[name]).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 128), (960, 576), (128, 1536)])
def test_products_are_those_of_rows(order: OneDnnLayout, n: int, k: int, dtype: torch.dtype) -> None:
    matrix = order.matrix((n, k), dtype)
    if matrix is None:
        pytest.skip("padded on this machine")
    rows = torch.randn(n, k).to(dtype)
    memory = rows.clone().view(-1).view(torch.uint8)
    matrix.arrange(memory)
    ordered = matrix.over(memory)
    for tokens in (1, 3, 32, 100):
        x, bias = torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype)
        wanted = torch.nn.functional.linear(x.double(), rows.double(), bias.double())
        error = float((multiply(x, ordered, bias).double() - wanted).abs().max() / wanted.abs().max())
        assert error < (1e-5 if dtype is torch.float32 else 1e-2)


def test_onednn_layout_keeps_rows_that_would_take_more_bytes(order: OneDnnLayout) -> None:
    for shape in [(17, 33), (100, 48), (64,), (2, 64, 64)]:
        matrix = order.matrix(shape, torch.float32)
        assert (
            matrix is None
            or torch.ops.mkldnn._nbytes(torch.ops.mkldnn._reorder_linear_weight(torch.empty(shape), None))
            == 4 * shape[0] * shape[1]
        )
    assert order.matrix((1 << 16, 1 << 16), torch.float32) is None  # a second copy would take 16 GiB
    assert order.matrix((64, 64), torch.int8) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_onednn_layout_of_a_model_computes_the_same_and_survives_eviction(
    order: OneDnnLayout, name: str, tmp_path: Path
) -> None:
    model = made(name)
    asked = prompts(VOCAB, (5, 40))
    resident = bring_up(save(model, tmp_path))
    try:
        ordered = resident.blueprint.ordered
        assert len(ordered) >= 2 * 4
        assert not any("embed" in each for each in ordered)
        assert any("lm_head" in each for each in ordered) == (name != "tied")
        assert resident.blueprint.path.startswith("unfused" if name == "unfused" else "fused")
        wanted = hf_logits(model, asked)
        first = resident.logits(asked, chunk=16)
        assert_same(first, wanted)
        weights = resident.memory.weights_view
        resident.memory.evict()
        weights.fill_(3)  # as another model that had the slabs would leave them
        resident.memory.swap_in(range(resident.memory.weight_slabs))
        assert all(torch.equal(a, b) for a, b in zip(first, resident.logits(asked, chunk=16), strict=True))
    finally:
        resident.memory.close()


def test_onednn_layout_falls_back_to_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runtime.engine.model.cpu.onednn_layout._Shim", lambda: torch.ops.mkldnn.what_there_is_not)
    model, asked = made("untied"), prompts(VOCAB, (7,))
    resident = bring_up(save(model, tmp_path))
    try:
        assert not resident.blueprint.ordered
        assert_same(resident.logits(asked, chunk=16), hf_logits(model, asked))
    finally:
        resident.memory.close()
