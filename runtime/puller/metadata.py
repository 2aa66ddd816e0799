"""Reads a model's configuration and its tensors' shapes without its weights: from local files, or from a source by a few small reads."""

from collections.abc import Mapping, Sequence

from runtime.errors import LoadFailed
from runtime.puller.checkpoint_check import LARGEST_JSON_BYTES, CheckpointKind, CheckpointSummary, parse_json
from runtime.puller.gguf_index import read_remote_index
from runtime.puller.gguf_metadata import geometry_in, read_gguf
from runtime.puller.progress import PullJob
from runtime.puller.safetensors_header import header_length, parse_header
from runtime.puller.sizing import TensorShape
from runtime.puller.source import RemoteFile, Source

Found = tuple[Mapping[str, object], Sequence[TensorShape]]


def look_local(found: CheckpointSummary) -> Found:
    if found.kind is CheckpointKind.GGUF:
        return read_gguf(found.weight_files[0])
    return found.config, found.tensors


def look_remote(source: Source, job: PullJob) -> Found:
    """Return the configuration and the tensors' shapes of a remote checkpoint, reading headers only. Raises LoadFailed."""
    listing = source.listing(job)
    by_name = {file.name: file for file in listing.files}
    config_file = by_name.get("config.json")
    if listing.files and listing.files[0].name.endswith(".gguf"):
        return _look_remote_gguf(source, listing.origin, listing.files[0], job)
    if config_file is None:
        raise LoadFailed(f"{listing.origin} has neither a config.json nor a GGUF file")
    # A source may not know a size (-1) or state a wrong one.
    count = config_file.size_bytes if 0 <= config_file.size_bytes <= LARGEST_JSON_BYTES else LARGEST_JSON_BYTES + 1
    config = parse_json(f"{listing.origin}: config.json", source.read(config_file, 0, count, job))
    tensors: list[TensorShape] = []
    for file in listing.files:
        if file.name.endswith(".safetensors"):
            job.check()
            tensors.extend(_read_shapes(source, file, job))
    return config, tensors


def _look_remote_gguf(source: Source, origin: str, file: RemoteFile, job: PullJob) -> Found:
    if file.size_bytes < 0:
        raise LoadFailed(f"{origin}: its size is known only after it was pulled; load it once")
    index = read_remote_index(file.name, file.size_bytes, lambda count: source.read(file, 0, count, job))
    return geometry_in(file.name, index)


def _read_shapes(source: Source, file: RemoteFile, job: PullJob) -> Sequence[TensorShape]:
    length = header_length(
        file.name, source.read(file, 0, 8, job), file.size_bytes if file.size_bytes >= 0 else 1 << 62
    )
    return parse_header(file.name, source.read(file, 8, length, job)).tensors
