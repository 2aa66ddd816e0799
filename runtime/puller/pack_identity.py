"""Decides the format that a model runs in, and the key and the size of its packed file."""

import hashlib

from common.model_key import ModelSettings, Quantization
from runtime.errors import InvalidRequest
from runtime.puller.checkpoint_check import CheckpointKind, CheckpointSummary
from runtime.puller.pack.request import PACKER_VERSION
from runtime.puller.sizing import DTYPE_BYTES, keeps_blocks, tensor_bytes, with_codes_as_bytes

# Their layers are transformers' Conv1D, whose weights are transposed and which the packer leaves as they are.
_WITHOUT_LINEAR_LAYERS = frozenset({"GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2Model", "OpenAIGPTLMHeadModel"})
_GGUF_GROWTH = 4  # dequantised bytes for one byte of file, at most about


def chosen_quantization(stored: Quantization, settings: ModelSettings, name: str) -> Quantization:
    """Return the format that the model runs in: a checkpoint that is quantised already is not quantised again. Raises InvalidRequest."""
    if stored is Quantization.NONE:
        return settings.quantize
    if settings.quantize not in (Quantization.NONE, stored):
        raise InvalidRequest(
            f"quantize is {settings.quantize.value}, and {name} is stored in {stored.value} already", param="quantize"
        )
    return stored


def check_quantizable(architecture: str, quantization: Quantization) -> None:
    """Raise InvalidRequest for a format that no layer of the architecture can have."""
    if quantization is not Quantization.NONE and architecture in _WITHOUT_LINEAR_LAYERS:
        raise InvalidRequest(
            f"{architecture} has no linear layer that {quantization.value} could quantise; register it without quantize",
            param="quantize",
        )


def pack_key(identity: str, settings: ModelSettings, device: str) -> str:
    """Return a key of what decides a packed file's bytes, as far as it is known before the files are here."""
    parts = (
        PACKER_VERSION,
        identity,
        settings.quantize.value,
        str(settings.double_quant),
        settings.dtype,
        "cpu" if device == "cpu" else "gpu",
        *(("unpacked",) if settings.quantize is Quantization.NONE and not keeps_blocks(settings, device) else ()),
    )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def packed_bytes(found: CheckpointSummary, quantization: Quantization, dtype: str) -> int:
    """Return the size of a packed file; of a GGUF file an upper estimate."""
    if not found.tensors:
        return sum(file.stat().st_size for file in found.weight_files) * (
            _GGUF_GROWTH if found.kind is CheckpointKind.GGUF else 1
        )
    return sum(tensor_bytes(tensor, quantization, DTYPE_BYTES[dtype]) for tensor in with_codes_as_bytes(found.tensors))
