"""The interface of the places that models come from: a listing of files, and a way to fetch each.

It has one implementation per kind of storage, chosen in resolve.py. `wanted` selects the files of a repository that a checkpoint needs.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from runtime.errors import LoadFailed
from runtime.puller.progress import PullJob

_TEXT = (".json", ".txt", ".jinja", ".model")
_PICKLES = (".bin", ".pt", ".pth")
_SPLIT = re.compile(r"-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")
ADAPTER_CONFIG = "adapter_config.json"
# A LoRA adapter's files. It may bring the chat template that it was trained with; its tokenizer is the base's.
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json")
_LARGEST_TEXT_BYTES = 256 * 1024 * 1024


class Unreachable(LoadFailed):
    """The source does not answer. What was pulled from it before may still be used."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`digest` changes with the content (an ETag, a hash); `sha256`, `md5` and `crc32c` are hex, or "" if not given. `size_bytes` is -1 if unknown."""

    name: str
    location: str
    size_bytes: int
    digest: str = ""
    sha256: str = ""
    md5: str = ""
    crc32c: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a model at its source. `origin` names the source in messages and holds no secret."""

    origin: str
    files: Sequence[RemoteFile]

    @property
    def key(self) -> str:
        """Return text that is equal for equal content, as far as the source identifies content."""
        digest = hashlib.blake2b(self.origin.encode(), digest_size=16)
        for file in sorted(self.files, key=lambda one: one.name):
            digest.update(f"\0{file.name}\0{file.size_bytes}\0{file.sha256 or file.md5 or file.digest}".encode())
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(max(file.size_bytes, 0) for file in self.files)


Arrived = Callable[
    [int], None
]  # called with the bytes received since the last call; negative if they are fetched again


class Source(Protocol):
    """One model at one place. Methods block."""

    def listing(self, job: PullJob) -> Listing:
        """Return the files that a checkpoint needs. Raises LoadFailed naming what was not found or not reached."""

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        """Fetch `file` to `target`, resuming what is there, and verify the checksum that the source gives. Raises LoadFailed, OSError."""

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        """Return `count` bytes from `start`, to read headers without fetching the file."""


# The files of sentence-transformers' modules, such as 1_Pooling/config.json.
_MODULE = re.compile(r"[1-9]_(Pooling|Dense)/[^/]+\.(json|safetensors)")


def wanted(files: Sequence[RemoteFile], origin: str, *, allow_pickle: bool) -> list[RemoteFile]:
    """Return the files that a checkpoint needs: one kind of weights, configuration and tokenizer; or those of a LoRA adapter.

    Raises LoadFailed if there are no weights.
    """
    top = [
        file
        for file in files
        if len(PurePosixPath(file.name).parts) == 1
        or file.name.startswith("additional_chat_templates/")
        or _MODULE.fullmatch(file.name)
    ]
    dense = [file for file in top if _MODULE.fullmatch(file.name) and file.name.endswith(".safetensors")]
    top = [file for file in top if file not in dense]
    top_names = {file.name for file in top}
    if ADAPTER_CONFIG in top_names and "config.json" not in top_names:
        return [file for file in top if file.name in ADAPTER_FILES]
    weights = [
        file
        for file in top
        if file.name.endswith(".safetensors") and not file.name.startswith(("consolidated", "adapter_"))
    ]
    if not weights:
        weights = [file for file in top if file.name.endswith(".gguf")]
        for file in weights:
            refuse_split(file.name, origin)
        if len(weights) > 1:
            names = ", ".join(file.name for file in weights[:4])
            raise LoadFailed(
                f"{origin} has {len(weights)} GGUF files ({names}…): name one of them at the end of the URI"
            )
    if not weights:
        weights = [file for file in top if file.name.endswith(_PICKLES) and file.name != "training_args.bin"]
        if weights and not allow_pickle:
            raise LoadFailed(
                f"{origin} has only pickled weights ({weights[0].name}), which can run code when they are read; "
                "use a safetensors version of it, or set allow_pickle"
            )
    if not weights:
        raise LoadFailed(f"{origin} has no weights: no *.safetensors and no .gguf among {len(files)} files")
    return (
        weights + dense + [file for file in top if file.name.endswith(_TEXT) and file.size_bytes <= _LARGEST_TEXT_BYTES]
    )


def module_files(model_dir: Path) -> list[Path]:
    """Return the files of sentence-transformers' modules beside a checkpoint."""
    found = model_dir.glob("[1-9]_*/*")
    return sorted(file for file in found if _MODULE.fullmatch(f"{file.parent.name}/{file.name}") and file.is_file())


def refuse_split(name: str, origin: str) -> None:
    """Raise LoadFailed for the name of one part of a split GGUF file."""
    match = _SPLIT.search(name)
    if match is not None and int(match["parts"]) > 1:
        raise LoadFailed(
            f"{origin}: {name} is part {int(match['part'])} of a GGUF file that was split into {int(match['parts'])}, which cannot be "
            "loaded in parts; merge them with `llama-gguf-split --merge` and register the whole file"
        )


def checked_name(name: str, origin: str) -> str:
    """Return a file name of a listing. Raises LoadFailed if it leads out of the directory that it is put in."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise LoadFailed(f"{origin} lists a file {name!r}, which would lie outside the model's directory")
    return str(path)
