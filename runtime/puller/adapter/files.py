"""Inspects the files of a PEFT adapter before it is packed. Reads JSON and headers only."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.adapter.config import read_adapter_config
from runtime.puller.adapter.modules import AdaptedModule, pair_tensors
from runtime.puller.safetensors_header import read_header
from runtime.puller.source import ADAPTER_CONFIG, ADAPTER_FILES

PICKLED_NAME = "adapter_model.bin"
_, WEIGHTS_NAME, *TEMPLATE_NAMES = ADAPTER_FILES
# Room for a hundred thousand tensors. Parsing a header takes many times its size in memory.
_MAX_HEADER_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A PEFT adapter on this machine. `identity` changes with the files: names, sizes, times."""

    folder: Path
    modules: Sequence[AdaptedModule]
    identity: str

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_NAME


def is_adapter(folder: Path) -> bool:
    """Return whether a directory looks like a PEFT adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def identity_of(folder: Path) -> str:
    """Return text that changes with the adapter's files. Raises LoadFailed naming the file that is missing."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (ADAPTER_CONFIG, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise _missing(folder, name)
    for name in (ADAPTER_CONFIG, WEIGHTS_NAME, *TEMPLATE_NAMES):
        if (file := folder / name).is_file():
            status = file.stat()
            digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def inspect_adapter(folder: Path, max_rank: int) -> AdapterFiles:
    """Inspect a directory. Raises LoadFailed naming the file, option or tensor that is missing, damaged or not supported."""
    identity = identity_of(folder)
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    tensors = read_header(folder / WEIGHTS_NAME, _MAX_HEADER_BYTES).tensors
    return AdapterFiles(folder, pair_tensors(tensors, config, max_rank), identity)


def _missing(folder: Path, name: str) -> LoadFailed:
    if name == WEIGHTS_NAME and (folder / PICKLED_NAME).is_file():
        return LoadFailed(
            f"{folder} has only pickled weights ({PICKLED_NAME}), which can run code when they are read; "
            "save the adapter again with safe_serialization"
        )
    return LoadFailed(f"{folder} has no {name}: it is not a PEFT adapter")
