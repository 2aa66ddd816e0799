"""GGUF's 4-bit blocks are kept in packed files bit for bit, and every other type is unpacked."""

import asyncio
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Blocks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.model_key import ModelSettings, Quantization
from runtime.checkpoint.quantized_shapes import KEPT_BLOCKS
from runtime.engine.kernels.linear4 import dequantize_4bit_torch
from runtime.puller.cache import Cache
from runtime.puller.gguf_index import read_index
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.pack.writer import PADDING
from runtime.puller.preparer import CheckpointPreparer
from runtime.puller.sizing import tensor_bytes
from runtime.types import ModelSource
from tests.support.gguf_files import write_llama
from tests.support.llama_checkpoints import tiny_llama
from tests.support.packing import pack_here
from tests.support.sources import OPEN

MIXED = {"attn_v": Blocks.Q8_0, "ffn_down": Blocks.Q4_1, "output": Blocks.Q8_0}


def write(folder: Path, kind: Blocks, *, mixed: bool = False, hidden: int = 64) -> Path:
    """Write a tiny Llama whose matrices are of one block type, or of `MIXED` types where these are named."""
    path = folder / "m.gguf"
    model = tiny_llama(folder / "model", hidden=hidden)
    write_llama(model, path, blocks=lambda name: MIXED.get(name.rpartition(".")[2], kind) if mixed else kind)
    return path


def packed(path: Path) -> dict[str, torch.Tensor]:
    out = path.parent / "out"
    out.mkdir()
    request = PackRequest("gguf", str(path.parent), (str(path),), str(out), "test", keep_blocks=True)
    pack(request, lambda event: None)
    return {name: tensor for name, tensor in load_file(out / PACKED_NAME).items() if not name.startswith(PADDING)}


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in float32 as transformers reads them from the file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


@pytest.mark.parametrize("hidden", [64, 96])
@pytest.mark.parametrize("kind", [Blocks.Q4_0, Blocks.IQ4_NL])
def test_pack_keeps_blocks_bit_for_bit(tmp_path: Path, kind: Blocks, hidden: int) -> None:
    path = write(tmp_path, kind, hidden=hidden)
    ours, theirs = packed(path), dequantised(path)
    name = KEPT_BLOCKS[kind.name]
    kept = [key for key in theirs if f"{key.removesuffix('.weight')}.{name}" in ours]
    assert len(kept) == 2 * 7
    for key, weight in theirs.items():
        if key in kept:
            scales = ours[f"{key.removesuffix('.weight')}.{name}"]
            assert scales.dtype is torch.float16
            found = dequantize_4bit_torch(ours[key], scales, name, weight.shape[1], torch.float32)
            assert torch.equal(found, weight), key
        else:
            assert torch.equal(ours[key], weight), key


def test_pack_treats_each_matrix_of_a_mixed_file_by_its_type(tmp_path: Path) -> None:
    path = write(tmp_path, Blocks.Q4_0, mixed=True)
    ours, theirs = packed(path), dequantised(path)
    unpacked = {"model.embed_tokens.weight", "lm_head.weight"}
    unpacked |= {key for key in theirs if "v_proj" in key or "down_proj" in key}
    for key, weight in theirs.items():
        if weight.dim() == 1 or key in unpacked:
            assert torch.equal(ours[key], weight), key
        else:
            assert ours[key].dtype is torch.uint8, key


@pytest.mark.parametrize("mixed", [False, True])
def test_predicted_bytes_are_those_of_the_kept_blocks(tmp_path: Path, mixed: bool) -> None:
    path = write(tmp_path, Blocks.Q4_0, mixed=mixed)
    stored = sum(tensor.numel() * tensor.itemsize for tensor in packed(path).values())
    tensors = read_index(path).tensors
    assert stored == sum(tensor_bytes(tensor, Quantization.NONE, 4, keep_blocks=True) for tensor in tensors)


async def test_kept_blocks_are_quantised_from_the_file(tmp_path: Path) -> None:
    """The pack that keeps blocks holds no weights that could be quantised again."""
    path = write(tmp_path, Blocks.Q4_0)

    async def prepared(cache: Path, *settings: ModelSettings) -> bytes:
        preparation = CheckpointPreparer(OPEN, Cache(cache, 1 << 30), pack_here)
        for one in settings:
            found = await preparation.prepare(ModelSource(str(path)), one, "cpu", lambda progress: None)
        preparation.close()
        assert found.checkpoint.packed_file is not None
        return await asyncio.to_thread(Path(found.checkpoint.packed_file).read_bytes)

    nf4 = ModelSettings(quantize=Quantization.NF4)
    after = await prepared(tmp_path / "after", ModelSettings(gguf_blocks="keep"), nf4)
    assert after == await prepared(tmp_path / "alone", nf4)


async def test_look_says_that_nothing_is_unpacked_where_most_blocks_are_kept(tmp_path: Path) -> None:
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    source = ModelSource(str(write(tmp_path, Blocks.Q4_0)))
    look = await preparation.look(source, ModelSettings(), "cuda")
    assert look.unpacking is None
    embeddings = 2 * 2 * look.geometry.vocab_size * look.geometry.hidden_size  # and the output projection, unpacked
    assert look.needs.weight_bytes - embeddings < 0.7 * look.needs.num_parameters
    quantised = await preparation.look(source, ModelSettings(quantize=Quantization.INT8), "cuda")
    assert quantised.unpacking is not None
    assert quantised.unpacking.blocks == "Q4_0"
    preparation.close()


@pytest.mark.parametrize(
    ("device", "settings", "is_kept"),
    [
        ("cpu", ModelSettings(), False),
        ("cpu", ModelSettings(gguf_blocks="keep"), True),
        ("cuda", ModelSettings(), True),
        ("cuda", ModelSettings(gguf_blocks="unpack"), False),
    ],
)
async def test_blocks_are_kept_where_they_are_fast_or_wanted(
    tmp_path: Path, device: str, settings: ModelSettings, is_kept: bool
) -> None:
    """The file, the prediction and the packs of the other choice in the same cache agree."""
    source = ModelSource(str(write(tmp_path, Blocks.Q4_0)))
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    other = ModelSettings(gguf_blocks="unpack" if is_kept else "keep")
    for one in (other, settings):
        found = await preparation.prepare(source, one, device, lambda progress: None)
    assert found.checkpoint.packed_file is not None
    tensors = load_file(found.checkpoint.packed_file)
    assert any(name.endswith(".q4_0") for name in tensors) is is_kept
    look = await preparation.look(source, settings, device)
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith(PADDING))
    assert look.needs.weight_bytes == stored
    assert (look.unpacking is None) is is_kept
    if look.unpacking is not None:
        kept = (await preparation.look(source, other, device)).needs.weight_bytes
        assert look.unpacking.kept_weight_bytes == kept < 0.7 * stored
    preparation.close()
