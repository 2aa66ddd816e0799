"""The messages between the runtime and the packer process, one line of JSON each. Free of torch, so that the runtime can import them."""

import msgspec

from common.model_key import Quantization

PACKED_NAME = "packed.safetensors"
FORMAT = "repertory-packed-1"
# part of every key: raise it when the same input would give other bytes
PACKER_VERSION = "6"


class PackRequest(msgspec.Struct, frozen=True):
    """`kind` as runtime.puller.checkpoint_check.CheckpointKind. `pack_weights` False: only the tokenizer is converted.

    `keep_blocks`: blocks of a GGUF file that the kernels read stay as they are.
    """

    kind: str
    model_dir: str
    weight_files: tuple[str, ...]
    out_dir: str
    source: str  # the source's identity, kept in the file
    quantization: Quantization = Quantization.NONE
    double_quant: bool = False
    keep_blocks: bool = False
    dtype: str = "float32"
    pack_weights: bool = True


class PackProgress(msgspec.Struct, frozen=True, tag="progress"):
    done_bytes: int
    total_bytes: int
    text: str


class PackDone(msgspec.Struct, frozen=True, tag="done"):
    size_bytes: int


class PackFailed(msgspec.Struct, frozen=True, tag="failed"):
    """`code` is a gRPC status name; `errno` that of a full disk, else 0."""

    code: str
    message: str
    errno: int = 0


PackEvent = PackProgress | PackDone | PackFailed
