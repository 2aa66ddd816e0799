"""The seam to where models come from: a listing of files and a way to fetch each. One implementation a kind of storage, chosen by locate.py.

Also says which of a repository's files a checkpoint needs. Knows no protocol.
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
_LARGEST_TEXT_BYTES = 256 * 1024 * 1024


class Unreachable(LoadFailed):
    """The source doesn't answer at all; what was pulled from it before may still be used."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`digest` changes with the content (an ETag, a hash); `sha256`, `md5` and `crc32c` are hex, "" = not given. `size_bytes` -1 = not known."""

    name: str
    location: str
    size_bytes: int
    digest: str = ""
    sha256: str = ""
    md5: str = ""
    crc32c: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a model consists of at its source. `origin` is for people and holds no secret."""

    origin: str
    files: Sequence[RemoteFile]

    @property
    def key(self) -> str:
        """Equal for equal content, as far as the source tells."""
        digest = hashlib.blake2b(self.origin.encode(), digest_size=16)
        for file in sorted(self.files, key=lambda one: one.name):
            digest.update(f"\0{file.name}\0{file.size_bytes}\0{file.sha256 or file.md5 or file.digest}".encode())
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(max(file.size_bytes, 0) for file in self.files)


Arrived = Callable[[int], None]  # bytes that came, since the last call


class Source(Protocol):
    """One model at one place. Methods block."""

    def listing(self, job: PullJob) -> Listing:
        """The files that a checkpoint needs. Raises LoadFailed saying what couldn't be found or reached."""

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        """Bring `file` to `target`, going on from what is there. Checks what the source gives to check by. Raises LoadFailed, OSError."""

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        """Some bytes of a file, to look at headers without fetching it."""


def wanted(files: Sequence[RemoteFile], origin: str, *, allow_pickle: bool) -> list[RemoteFile]:
    """Of a repository's files those that a checkpoint needs: one kind of weights, configuration and tokenizer. Raises LoadFailed if there are none."""
    top = [
        file
        for file in files
        if len(PurePosixPath(file.name).parts) == 1 or file.name.startswith("additional_chat_templates/")
    ]
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
    return weights + [file for file in top if file.name.endswith(_TEXT) and file.size_bytes <= _LARGEST_TEXT_BYTES]


def refuse_split(name: str, origin: str) -> None:
    """Raise LoadFailed for the name of one part of a split GGUF file."""
    match = _SPLIT.search(name)
    if match is not None and int(match["parts"]) > 1:
        raise LoadFailed(
            f"{origin}: {name} is part {int(match['part'])} of a GGUF file that was split into {int(match['parts'])}, which can't be "
            "loaded in parts; merge them with `llama-gguf-split --merge` and register the whole file"
        )


def checked_name(name: str, origin: str) -> str:
    """A file name from elsewhere, which must stay inside the directory that it is put in."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise LoadFailed(f"{origin} lists a file {name!r}, which would lie outside the model's directory")
    return str(path)
