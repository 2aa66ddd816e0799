"""Reads a GGUF file's geometry from its index, with the field names of config.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import GgufIndex, read_index
from runtime.puller.sizing import TensorShape

_FIELDS = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
}


def read_gguf(path: Path) -> tuple[Mapping[str, object], Sequence[TensorShape]]:
    """Return the configuration and the tensors' shapes. Raises LoadFailed if the file is damaged or lacks either."""
    return geometry_in(path.name, read_index(path))


def geometry_in(name: str, index: GgufIndex) -> tuple[Mapping[str, object], Sequence[TensorShape]]:
    """Return the geometry in an index that has been read from the file of this name."""
    if not index.architecture:
        raise LoadFailed(f"{name} has no general.architecture in its metadata")
    # A dtype is left out: the quantised weights have none, and the device computes in its own.
    config: dict[str, object] = {"architectures": [f"{index.architecture} (GGUF)"]}
    for field, name_in_config in _FIELDS.items():
        value = index.metadata.get(f"{index.architecture}.{field}")
        if isinstance(value, tuple):
            value = max(value, default=None)
        if isinstance(value, int):
            config[name_in_config] = int(value)
    embedding = next((tensor for tensor in index.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None or not embedding.shape:
        raise LoadFailed(f"{name} has no tensor token_embd.weight")
    config["vocab_size"] = embedding.shape[0]
    return config, index.tensors
