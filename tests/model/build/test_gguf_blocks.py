"""Models whose GGUF blocks are kept compute with the numbers that the blocks stand for: logits and greedy text of transformers."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Blocks
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.model_key import Quantization
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.types import Checkpoint
from tests.support.gguf_files import write_llama
from tests.support.llama_checkpoints import VOCAB, tiny_llama
from tests.support.steps import Resident, bring_up, hf_logits, prompts
from tests.support.tiny_models import assert_same

NEW_TOKENS = 12


def loaded(folder: Path, kind: Blocks, other: Blocks, *, fuse: bool) -> tuple[Resident, PreTrainedModel]:
    """Return a Llama with matrices of `kind` and, for values and down projections, of `other`, and transformers' own with the same weights."""
    original = tiny_llama(folder / "model", layers=3)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
    path = folder / "m.gguf"
    # The values of the first layer and the down projections of the second are of the other type.
    others = ("blk.0.attn_v", "blk.1.ffn_down")
    write_llama(original, path, blocks=lambda name: other if name in others else kind)
    out = folder / "out"
    out.mkdir()
    pack(PackRequest("gguf", str(folder), (str(path),), str(out), "test", keep_blocks=True), lambda event: None)
    checkpoint = Checkpoint(str(out), (), str(out / PACKED_NAME), Quantization.NONE, "float32")
    oracle: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    return bring_up(checkpoint, fuse=fuse), oracle.eval()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("kind", "other"),
    [(Blocks.Q4_0, Blocks.Q4_0), (Blocks.Q4_0, Blocks.Q8_0), (Blocks.IQ4_NL, Blocks.Q4_0), (Blocks.Q4_0, Blocks.F32)],
)
def test_kept_blocks_compute_what_transformers_does(tmp_path: Path, kind: Blocks, other: Blocks, fuse: bool) -> None:
    resident, oracle = loaded(tmp_path, kind, other, fuse=fuse)
    assert resident.built.path.startswith("fused" if fuse else "unfused")
    asked = prompts(VOCAB, [21, 6])
    assert_same(resident.logits(asked), hf_logits(oracle, asked), tolerance=1e-4)
    assert resident.blueprint.layout.size_bytes < 0.5 * sum(4 * one.numel() for one in oracle.parameters())


@pytest.mark.parametrize("kind", [Blocks.Q4_0, Blocks.IQ4_NL])
def test_greedy_text_of_kept_blocks_is_that_of_generate(tmp_path: Path, kind: Blocks) -> None:
    resident, oracle = loaded(tmp_path, kind, Blocks.Q8_0, fuse=True)
    [prompt] = prompts(VOCAB, [9])
    expected = oracle.generate(prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)[0]
    tokens = prompt
    while len(tokens) < len(prompt) + NEW_TOKENS:
        tokens = torch.cat((tokens, resident.logits([tokens])[0][-1:].argmax(-1)))
    assert tokens.tolist() == expected.tolist()
