"""Pickled checkpoints are packed exactly, or refused by the name of the tensor that is missing, unexpected or of another shape."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from runtime.errors import LoadFailed
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.pack.writer import PADDING
from tests.support import tokenizers
from tests.support.families import family
from tests.support.llama_checkpoints import tiny_llama

State = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def packed(folder: Path, model: PreTrainedModel, change: Callable[[State], None] = lambda state: None) -> State:
    """Write the model's weights as a pickle, changed, and pack them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    file = folder / "pytorch_model.bin"
    torch.save(state, file)
    out = folder / "out"
    out.mkdir()
    pack(PackRequest("pickle", str(folder), (str(file),), str(out), "test"), lambda event: None)
    return {name: tensor for name, tensor in load_file(out / PACKED_NAME).items() if not name.startswith(PADDING)}


def test_pack_reads_a_pickled_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    ours = packed(tmp_path, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def without(state: State) -> None:
    del state[UP]


def besides(state: State) -> None:
    state["model.layers.1.mlp.sideways.weight"] = torch.zeros(2)


def of_another_shape(state: State) -> None:
    state[UP] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without, f"has missing tensors for LlamaForCausalLM: {UP}"),
        (besides, "has unexpected tensors for LlamaForCausalLM: model.layers.1.mlp.sideways.weight"),
        (of_another_shape, "cannot be read"),
    ],
)
def test_pack_refuses_a_pickled_checkpoint_with_other_tensors(
    tmp_path: Path, change: Callable[[State], None], text: str
) -> None:
    with pytest.raises(LoadFailed) as caught:
        packed(tmp_path, tiny_llama(tmp_path), change)
    assert text in caught.value.detail


def test_pack_ignores_constants_in_an_old_pickled_checkpoint(tmp_path: Path) -> None:
    tokenizers.byte_level(tmp_path)
    model = family("gpt2")
    model.save_pretrained(tmp_path)

    def with_constants(state: State) -> None:
        for layer in range(3):
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)

    ours = packed(tmp_path, model, with_constants)
    assert torch.equal(ours["transformer.h.1.mlp.c_fc.weight"], model.state_dict()["transformer.h.1.mlp.c_fc.weight"])
