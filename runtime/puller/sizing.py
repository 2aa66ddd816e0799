"""Computes the memory that a model needs from its configuration and its files' index."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from common.model_key import ModelSettings, Quantization
from runtime.checkpoint.quantized_shapes import KEPT_BLOCKS, is_layer_matrix, kept_bytes, packed_bytes

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One tensor of a checkpoint, with safetensors' name of its dtype.

    `blocks`: of a GGUF file, whose tensors have the dtype that they are unpacked to, the type of the stored blocks, and `stored_bytes` their size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: str = ""
    stored_bytes: int = 0

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass(frozen=True, slots=True)
class Geometry:
    """The dimensions of a decoder, from config.json."""

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    dtype: str  # of the checkpoint; "" if not stated


@dataclass(frozen=True, slots=True)
class Needs:
    weight_bytes: int
    kv_bytes_per_token: int
    min_kv_bytes: int  # one request of max_model_len tokens
    workspace_bytes: int
    max_model_len: int
    num_parameters: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Quantised blocks of a file that take more memory once they are loaded.

    Attributes:
        blocks: the type that holds most bytes, such as Q4_K.
        stored_bytes: the size of all tensors in the file.
        nf4_weight_bytes: the size of the weights if they were quantised to NF4; 0 if they are quantised already.
        kept_weight_bytes: the size of the weights if the blocks were kept; 0 if they cannot be.
    """

    blocks: str
    stored_bytes: int
    nf4_weight_bytes: int
    kept_weight_bytes: int


def needs_of(
    geometry: Geometry,
    tensors: Sequence[TensorShape],
    settings: ModelSettings,
    device: str,
    num_devices: int = 1,
) -> Needs:
    """Return the needs of a model on each of the `num_devices` that share it. If `tensors` is empty, because the index is unknown, parameters are counted from the geometry."""
    dtype = compute_dtype(settings.dtype, geometry.dtype, device)
    size = DTYPE_BYTES[dtype]
    max_model_len = min(settings.max_model_len or geometry.max_model_len, geometry.max_model_len)
    if tensors:
        tensors = with_codes_as_bytes(tensors)
        keep = keeps_blocks(settings, device)
        weight_bytes = sum(
            tensor_bytes(tensor, settings.quantize, size, keep_blocks=keep)
            // (num_devices if _is_divided(tensor) else 1)
            for tensor in tensors
        )
        num_parameters = sum(tensor.numel for tensor in tensors if tensor.dtype in _FLOATS)
    else:
        num_parameters = estimate_parameters(geometry)
        whole = geometry.vocab_size * geometry.hidden_size  # Each device has the embeddings.
        weight_bytes = ((num_parameters - whole) // num_devices + whole) * size
    num_kv_heads = max(1, geometry.num_kv_heads // num_devices)
    kv_bytes_per_token = 2 * geometry.num_layers * num_kv_heads * geometry.head_dim * size
    # the widest activation of a full step, twice, and its logits' row
    workspace_bytes = (
        8192 * size * max(geometry.intermediate_size * 2, geometry.hidden_size * 4) + geometry.vocab_size * 4
    )
    return Needs(
        weight_bytes,
        kv_bytes_per_token,
        kv_bytes_per_token * max_model_len,
        workspace_bytes,
        max_model_len,
        num_parameters,
        dtype,
    )


def _is_divided(tensor: TensorShape) -> bool:
    """Return whether devices that share a model have a part of this tensor each."""
    return tensor.name == "lm_head.weight" or is_layer_matrix(tensor.name, tensor.shape)


def unpacking_of(
    geometry: Geometry, tensors: Sequence[TensorShape], settings: ModelSettings, device: str
) -> Unpacking | None:
    """Return what unpacking quantised blocks costs; None for a checkpoint without any, and where most are kept as they are."""
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.blocks] += tensor.stored_bytes
    quantised = {blocks: size for blocks, size in stored.items() if blocks not in ("", *_FLOATS)}
    if not quantised:
        return None
    blocks = max(quantised, key=quantised.__getitem__)
    if blocks in KEPT_BLOCKS and keeps_blocks(settings, device):
        return None
    nf4_weight_bytes = kept_weight_bytes = 0
    if settings.quantize is Quantization.NONE:
        as_nf4 = msgspec.structs.replace(settings, quantize=Quantization.NF4)
        nf4_weight_bytes = needs_of(geometry, tensors, as_nf4, device).weight_bytes
        if blocks in KEPT_BLOCKS:
            as_stored = msgspec.structs.replace(settings, gguf_blocks="keep")
            kept_weight_bytes = needs_of(geometry, tensors, as_stored, device).weight_bytes
    return Unpacking(blocks, stored.total(), nf4_weight_bytes, kept_weight_bytes)


def keeps_blocks(settings: ModelSettings, device: str) -> bool:
    """Whether blocks of a GGUF file that the kernels read stay as they are. On a CPU they take 3 to 5 times as long as unpacked weights."""
    wanted = settings.gguf_blocks == "keep" or (settings.gguf_blocks == "auto" and device != "cpu")
    return wanted and settings.quantize is Quantization.NONE


def compute_dtype(wanted: str, checkpoint: str, device: str) -> str:
    """Return the type to compute in.

    `auto` is the checkpoint's own on a GPU (bfloat16 where it has none, as GGUF) and float32 on a CPU, where half precision may be emulated.
    """
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "float32"
    return checkpoint if checkpoint in ("float32", "bfloat16", "float16") else "bfloat16"


def tensor_bytes(tensor: TensorShape, quantize: Quantization, dtype_bytes: int, *, keep_blocks: bool = False) -> int:
    """Return the bytes of one tensor in memory.

    Matrices of decoder layers are quantised; tensors that are quantised already keep their size, and with `keep_blocks` so do GGUF blocks that the
    kernels read.
    """
    if tensor.dtype not in _FLOATS:
        return tensor.numel * DTYPE_BYTES.get(tensor.dtype, 1)
    packed = None
    if keep_blocks:
        packed = kept_bytes(tensor.name, tensor.shape, tensor.blocks)
    elif quantize is not Quantization.NONE and is_layer_matrix(tensor.name, tensor.shape):
        packed = packed_bytes(tensor.shape, quantize)
    return tensor.numel * dtype_bytes if packed is None else packed


def with_codes_as_bytes(tensors: Sequence[TensorShape]) -> list[TensorShape]:
    """Return the tensors with the codes of stored 4-bit matrices as bytes: a file may hold them as numbers of any type (bnb_4bit_quant_storage)."""
    stored = {name for tensor in tensors for name, part, _ in (tensor.name.partition(".quant_state."),) if part}
    return [
        TensorShape(tensor.name, "U8", (tensor.numel * DTYPE_BYTES.get(tensor.dtype, 1), 1))
        if tensor.name in stored
        else tensor
        for tensor in tensors
    ]


def estimate_parameters(geometry: Geometry) -> int:
    """Estimate a gated decoder's parameters from its configuration alone; heads that attend are assumed to span the hidden size."""
    attention = 2 * geometry.hidden_size**2 + 2 * geometry.hidden_size * geometry.num_kv_heads * geometry.head_dim
    layer = attention + 3 * geometry.hidden_size * geometry.intermediate_size
    return geometry.num_layers * layer + 2 * geometry.vocab_size * geometry.hidden_size


def checkpoint_dtype(config: Mapping[str, object]) -> str:
    """Return the dtype that config.json states for the weights, or ""."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        if dtype := part.get("dtype") or part.get("torch_dtype"):
            return str(dtype).removeprefix("torch.")
    return ""


def geometry_of(config: Mapping[str, object]) -> Geometry:
    """Read config.json, under the several names that families use. Raises KeyError naming what is missing."""
    text = config.get("text_config")
    inner: Mapping[str, object] = text if isinstance(text, dict) else config

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = inner.get(name, config.get(name))
            if isinstance(value, list) and value and isinstance(value[0], int):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if default is None:
            raise KeyError(names[0])
        return default

    hidden_size = number("hidden_size", "n_embd", "d_model")
    num_heads = number("num_attention_heads", "n_head", "num_heads")
    architectures = config.get("architectures")
    return Geometry(
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        num_layers=number("num_hidden_layers", "n_layer", "num_layers"),
        num_kv_heads=number("num_key_value_heads", "num_kv_heads", default=num_heads),
        head_dim=number("head_dim", default=hidden_size // num_heads),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden_size),
        vocab_size=number("vocab_size"),
        max_model_len=number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", default=2048),
        dtype=checkpoint_dtype(config),
    )
