"""What a GGUF file's index says, in config.json's and safetensors' words. Reads the index by the format's own library; converts nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import check_index
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
    """Raises LoadFailed if the file is damaged or says too little."""
    from gguf import GGUFReader

    check_index(path)
    try:
        reader: Any = GGUFReader(str(path))
        architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        # no dtype: what was quantised has none, and what a device computes in is its own
        config: dict[str, object] = {"architectures": [f"{architecture} (GGUF)"]}
        for field, name in _FIELDS.items():
            entry = reader.fields.get(f"{architecture}.{field}")
            if entry is not None:
                config[name] = int(entry.parts[entry.data[0]][0])
        # shapes are listed fastest dimension first; every tensor will be dequantised
        tensors = [
            TensorShape(tensor.name, "F32", tuple(int(size) for size in reversed(tensor.shape)))
            for tensor in reader.tensors
        ]
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        config["vocab_size"] = embedding.shape[0]
    except LoadFailed:
        raise
    except Exception as error:  # the reader indexes into mapped memory and raises whatever a damaged file leads it to
        raise LoadFailed(f"{path.name} is no whole GGUF file: {type(error).__name__}: {error}") from error
    return config, tensors
