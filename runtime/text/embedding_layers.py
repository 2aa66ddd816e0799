"""Computes sentence-transformers' modules that follow the pooling: Dense and Normalize."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from runtime.errors import LoadFailed

_MOST_BYTES = 256 << 20  # of a Dense module's file, which is held in host memory: 8192 × 8192 values in float32
Array = npt.NDArray[np.float32]
Layer = Callable[[Array], Array]
"""Maps vectors [N, size] to vectors [N, other size], float32."""


def _sigmoid(x: Array) -> Array:
    half = np.float32(0.5)
    found: Array = half * (np.tanh(half * x) + np.float32(1))  # without the overflow of exp(-x)
    return found


_ACTIVATIONS: Mapping[str, Layer] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "Sigmoid": _sigmoid,
    "SiLU": lambda x: x * _sigmoid(x),
}


class DenseConfig(msgspec.Struct, frozen=True):
    """2_Dense/config.json."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"

    @property
    def activation(self) -> str:
        return self.activation_function.rpartition(".")[2]

    @property
    def unsupported(self) -> str:
        """Why this server cannot compute the layer; empty = it can."""
        if self.activation in _ACTIVATIONS:
            return ""
        return f"its Dense module has the activation {self.activation}; {', '.join(_ACTIVATIONS)} are supported"


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """activation(x · weightᵀ + bias) of vectors [N, in_features]."""

    weight: Array
    bias: Array | None
    activation: str

    def __call__(self, vectors: Array) -> Array:
        y = vectors @ self.weight.T
        return _ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


def read_dense(folder: Path, config: DenseConfig) -> Dense:
    """Read the weights of a Dense module. Raises LoadFailed naming the file."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise LoadFailed(f"{path} is missing: the weights of a Dense module must be safetensors, not pickled")
    try:
        if (size_bytes := path.stat().st_size) > _MOST_BYTES:
            raise LoadFailed(f"{path} has {size_bytes} bytes; the limit for a Dense module is {_MOST_BYTES} bytes")
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError, KeyError) as error:  # numpy has no bfloat16
        raise LoadFailed(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    shape = (config.out_features, config.in_features)
    if weight is None or weight.shape != shape:
        raise LoadFailed(f"{path} has no linear.weight of shape {list(shape)}, which its config.json states")
    if config.bias != (bias is not None) or (bias is not None and bias.shape != shape[:1]):
        raise LoadFailed(f"{path}: linear.bias differs from what its config.json states")
    return Dense(weight.astype(np.float32), None if bias is None else bias.astype(np.float32), config.activation)


def normalize(vectors: Array) -> Array:
    """Return the vectors with length 1. A vector of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Array = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled
