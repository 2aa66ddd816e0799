"""Writes random Llama checkpoints in the shapes of docs/benchmarks, as sharded safetensors. A GPU is optional."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions. `parameters` counts the matrices."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return qkv + self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def body_parameters(self) -> int:
        return self.layers * self.layer_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def step_bytes(self, body_bytes_per_parameter: float) -> float:
        """Return the bytes of weights that a decode step reads: the layers, and the output projection in bf16."""
        return self.body_parameters * body_bytes_per_parameter + 2.0 * self.vocab * self.hidden


LLAMA_8B = Shape("8B", 4096, 14336, 32, 32, 8, 128_256, tied=False)
LLAMA_70B = Shape("70B", 8192, 28672, 80, 64, 8, 128_256, tied=False)
LLAMA_1B = Shape("1B", 2048, 8192, 16, 32, 8, 128_256, tied=True)
TINY = Shape("tiny", 256, 704, 2, 4, 2, 1024, tied=False)
SHAPES = {shape.name: shape for shape in (LLAMA_70B, LLAMA_8B, LLAMA_1B, TINY)}


def write(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of normal random bf16 weights, unless it exists. A shard has a few GB."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = (
            (torch.randn(rows, columns, generator=generator, device=device) * (0.7 / columns**0.5))
            .to(torch.bfloat16)
            .cpu()
        )
        return drawn

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    index: dict[str, str] = {}
    total = 0

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_shard = 8
    num_shards = (shape.layers + per_shard - 1) // per_shard + 1
    for part in range(num_shards - 1):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(part * per_shard, min((part + 1) * per_shard, shape.layers)):
            base = f"model.layers.{layer}."
            tensors[base + "self_attn.q_proj.weight"] = matrix(q, shape.hidden)
            tensors[base + "self_attn.k_proj.weight"] = matrix(kv, shape.hidden)
            tensors[base + "self_attn.v_proj.weight"] = matrix(kv, shape.hidden)
            tensors[base + "self_attn.o_proj.weight"] = matrix(shape.hidden, q)
            tensors[base + "mlp.gate_proj.weight"] = matrix(shape.intermediate, shape.hidden)
            tensors[base + "mlp.up_proj.weight"] = matrix(shape.intermediate, shape.hidden)
            tensors[base + "mlp.down_proj.weight"] = matrix(shape.hidden, shape.intermediate)
            tensors[base + "input_layernorm.weight"] = ones(shape.hidden)
            tensors[base + "post_attention_layernorm.weight"] = ones(shape.hidden)
        shard(f"model-{part + 1:05d}-of-{num_shards:05d}.safetensors", tensors)
    rest = {"model.embed_tokens.weight": matrix(shape.vocab, shape.hidden), "model.norm.weight": ones(shape.hidden)}
    if not shape.tied:
        rest["lm_head.weight"] = matrix(shape.vocab, shape.hidden)
    shard(f"model-{num_shards:05d}-of-{num_shards:05d}.safetensors", rest)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    _write_tokenizer(folder, shape.vocab)
    (folder / "config.json").write_text(
        json.dumps(config_of(shape))
    )  # Written last: it marks the checkpoint as complete.
    if device == "cuda":
        torch.cuda.empty_cache()  # An engine takes its budget from the free memory.
    return folder


def config_of(shape: Shape) -> dict[str, object]:
    """Return the config.json of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a byte-level tokenizer with a word per id, so that any output can be decoded."""
    words = {f"Ġw{i}": i for i in range(vocab)}
    content: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "Ġw0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "Ġw0", "eos_token": "Ġw1"})
    )
