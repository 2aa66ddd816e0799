"""Writes a tiny Llama as GGUF, as llama.cpp's converter and its quantiser do."""

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

SPECIAL = ("<s>", "</s>", "<|eot|>")


def vocabulary(size: int, extra: Sequence[str] = ()) -> list[str]:
    tokens = [*SPECIAL, *extra, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    return [*tokens, *(f"unused{number}" for number in range(size - len(tokens)))]


def write_llama(
    model: LlamaForCausalLM,
    path: Path,
    *,
    pre: str | None = "gpt-2",
    extra: Sequence[str] = (),
    drop: str = "",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    blocks: Callable[[str], GGMLQuantizationType] = lambda name: GGMLQuantizationType.F32,
) -> None:
    """Write `model` to `path`, without tensors whose names contain `drop`.

    `extra` are user-defined tokens after the special ones. `blocks` returns the type of a matrix by its name in the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = vocabulary(config.vocab_size, extra)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [4] * len(extra) + [1] * (len(tokens) - len(SPECIAL) - len(extra)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        found = names.get_name(name.removesuffix(".weight"))
        assert found is not None
        if not drop or drop not in found:
            weights = _permuted(found, tensor, config.num_attention_heads, config.num_key_value_heads)
            kind = blocks(found) if weights.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(f"{found}.weight", in_blocks(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_blocks(weights: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the rows of `weights` as bytes of a block type. gguf itself cannot quantise to IQ4_NL."""
    if kind is not GGMLQuantizationType.IQ4_NL:
        blocks: np.ndarray = gguf.quantize(weights, kind)
        return blocks
    rows = weights.reshape(len(weights), -1, 32).astype(np.float32)
    scales = (np.abs(rows).max(-1, keepdims=True) / 113).astype(np.float16)
    table = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    codes = np.abs((rows / scales.astype(np.float32))[..., None] - table).argmin(-1).astype(np.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    made: np.ndarray = np.concatenate((scales.view(np.uint8), packed), -1).reshape(len(weights), -1)
    return made


def _permuted(name: str, tensor: torch.Tensor, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """Rotate pairs of neighbours, as ggml does, instead of halves."""
    weights: np.ndarray = tensor.detach().numpy()
    if not name.endswith(("attn_q", "attn_k")):
        return weights
    heads = num_heads if name.endswith("attn_q") else num_kv_heads
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
