"""Prepares the files of an adapter: packs them once for the type of the base, and finds the packed file again."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.model_key import Quantization
from runtime.errors import LoadFailed
from runtime.models.model_state import Phase, Prepared
from runtime.puller.adapter.files import identity_of, inspect_adapter
from runtime.puller.adapter.modules import packed_bytes
from runtime.puller.cache import Cache
from runtime.puller.inspection import ModelMetadata
from runtime.puller.pack.request import PACKED_NAME
from runtime.puller.pack.writer import ALIGNMENT_BYTES
from runtime.puller.progress import PullJob
from runtime.puller.safetensors_header import read_header
from runtime.puller.sizing import DTYPE_BYTES, Geometry, Needs
from runtime.types import Checkpoint

# part of every key: raise it when the same input would give other bytes
_PACKING_VERSION = "1"


@dataclass(frozen=True, slots=True)
class AdapterPreparer:
    """Packs adapters into the disk cache. `max_rank`: larger ranks are refused. Methods block."""

    cache: Cache
    max_rank: int

    def find(self, identity: str, dtype: str) -> Prepared | None:
        """Return an adapter that was packed before, by its source's identity and the type of its base."""
        held = self.cache.find("packed", _key(identity, dtype))
        if held is None:
            return None
        file = held.path / PACKED_NAME
        try:
            header = read_header(file)
        except LoadFailed:
            held.release()
            raise
        weight_bytes = sum(tensor.numel * DTYPE_BYTES[tensor.dtype] for tensor in header.tensors)
        return Prepared(
            Checkpoint(str(held.path), packed_file=str(file), dtype=dtype, weight_bytes=weight_bytes),
            held.release,
            identity,
        )

    def prepare(self, folder: Path, identity: str, dtype: str, job: PullJob) -> Prepared:
        """Return the packed adapter of a directory, packing it if it was not packed before. `identity` "" = that of the files."""
        identity = identity or identity_of(folder)
        found = self.find(identity, dtype)
        if found is not None:
            return found
        files = inspect_adapter(folder, self.max_rank)
        job.say(Phase.PACKING, 0, 0, "packing the adapter")

        def fill(work: Path) -> None:
            # Imported here because it needs numpy, which a front process without adapters does without.
            from runtime.puller.adapter.packing import pack_adapter

            pack_adapter(files, dtype, work, job)

        need_bytes = packed_bytes(files.modules, DTYPE_BYTES[dtype], ALIGNMENT_BYTES)
        self.cache.obtain("packed", _key(identity, dtype), need_bytes, fill, job, f"packing {folder.name}").release()
        found = self.find(identity, dtype)
        if found is None:
            raise LoadFailed(
                f"{folder.name}: the packed adapter was dropped from the disk cache at once; its budget is too small"
            )
        return found

    def look(self, folder: Path, dtype: str) -> ModelMetadata:
        """Return what an adapter needs beside its base, from its files' headers."""
        files = inspect_adapter(folder, self.max_rank)
        parameters = sum(module.padded_rank * (module.in_features + module.out_features) for module in files.modules)
        geometry = Geometry("LoRA adapter", 0, 0, 0, 0, 0, 0, 0, dtype)
        needs = Needs(packed_bytes(files.modules, DTYPE_BYTES[dtype], ALIGNMENT_BYTES), 0, 0, 0, 0, parameters, dtype)
        return ModelMetadata(geometry, needs, Quantization.NONE, True, {})


def _key(identity: str, dtype: str) -> str:
    return hashlib.blake2b(
        "\0".join(("adapter", _PACKING_VERSION, identity, dtype)).encode(), digest_size=16
    ).hexdigest()
