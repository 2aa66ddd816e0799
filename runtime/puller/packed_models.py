"""Packs checkpoints into the disk cache, once per identity and settings, and finds packed files again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.model_key import ModelSettings, Quantization
from runtime.checkpoint.quantized_shapes import KEPT_BLOCKS
from runtime.errors import LoadFailed
from runtime.models.model_state import Phase, Prepared
from runtime.puller.cache import Cache, Held
from runtime.puller.checkpoint_check import CheckpointKind, CheckpointSummary
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.pack_identity import chosen_quantization, pack_key, packed_bytes
from runtime.puller.progress import PullJob
from runtime.puller.safetensors_header import read_header
from runtime.puller.sizing import DTYPE_BYTES, checkpoint_dtype, compute_dtype, keeps_blocks, tensor_bytes
from runtime.types import Checkpoint

_TOKENIZER_BYTES = 64 << 20
_KEPT_SUFFIXES = tuple(f".{kind}" for kind in KEPT_BLOCKS.values())

Packer = Callable[[PackRequest, PullJob], None]


@dataclass(frozen=True, slots=True)
class PackedModels:
    """The packed files of one disk cache. Methods block."""

    cache: Cache
    packer: Packer

    def find(self, key: str) -> Prepared | None:
        """Return the packed file of a key, held against eviction. Raises LoadFailed for a damaged one."""
        held = self.cache.find("packed", key)
        if held is None:
            return None
        try:
            header = read_header(held.path / PACKED_NAME)
        except LoadFailed:
            held.release()
            raise
        checkpoint = Checkpoint(
            model_dir=str(held.path),
            packed_file=str(held.path / PACKED_NAME),
            quantization=Quantization(header.metadata["quantization"]),
            dtype=header.metadata["dtype"],
            weight_bytes=header.file_bytes,
        )
        return Prepared(checkpoint, held.release)

    def prepare(
        self,
        found: CheckpointSummary,
        pulled: Held | None,
        identity: str,
        settings: ModelSettings,
        device: str,
        job: PullJob,
    ) -> Prepared:
        """Return the checkpoint in the settings' format: as its files are where the engine reads them so, else packed.

        `pulled` holds the files in the cache, and is released once they are not needed any more.
        """
        quantization = chosen_quantization(found.quantization, settings, found.model_dir.name)
        dtype = compute_dtype(settings.dtype, checkpoint_dtype(found.config), device)
        if found.kind is CheckpointKind.SAFETENSORS and quantization is Quantization.NONE:
            return self._in_place(found, pulled, dtype, job)
        key = pack_key(identity, settings, device)
        packed = self.find(key)
        if packed is None:
            request = PackRequest(
                kind=found.kind.value,
                model_dir=str(found.model_dir),
                weight_files=tuple(str(file) for file in found.weight_files),
                out_dir="",
                source=identity,
                quantization=quantization,
                double_quant=settings.double_quant,
                keep_blocks=keeps_blocks(settings, device),
                dtype=dtype,
            )
            plain = self._dequantised(request, identity, settings, device)
            try:
                if plain is not None:
                    packed_file = plain.checkpoint.packed_file or ""
                    request = msgspec.structs.replace(
                        request,
                        kind=CheckpointKind.SAFETENSORS.value,
                        model_dir=plain.checkpoint.model_dir,
                        weight_files=(packed_file,),
                    )
                self._pack(key, request, packed_bytes(found, quantization, dtype), job).release()
            finally:
                if plain is not None:
                    plain.release()
            packed = self.find(key)
            if packed is None:
                raise LoadFailed(
                    f"{found.model_dir.name}: the packed file was dropped from the disk cache at once; its budget is too small"
                )
        if pulled is not None:
            pulled.release()
        return packed

    def _dequantised(
        self, request: PackRequest, identity: str, settings: ModelSettings, device: str
    ) -> Prepared | None:
        """Return a GGUF file's unquantised pack if there is one: reading a GGUF file again takes much longer than quantising.

        A pack that keeps some of the file's blocks is not what is quantised.
        """
        if request.kind != CheckpointKind.GGUF.value or request.quantization is Quantization.NONE:
            return None
        plain = msgspec.structs.replace(settings, quantize=Quantization.NONE, double_quant=False)
        found = self.find(pack_key(identity, plain, device))
        if found is None or found.checkpoint.packed_file is None:
            return found
        tensors = read_header(Path(found.checkpoint.packed_file)).tensors
        if any(tensor.name.endswith(_KEPT_SUFFIXES) for tensor in tensors):
            found.release()
            return None
        return found

    def _in_place(self, found: CheckpointSummary, pulled: Held | None, dtype: str, job: PullJob) -> Prepared:
        """Return the checkpoint in its own files. Only a tokenizer that has to be converted is packed."""
        model_dir, converted = str(found.model_dir), None
        if found.needs_tokenizer:
            request = PackRequest(
                kind=found.kind.value,
                model_dir=model_dir,
                weight_files=(),
                out_dir="",
                source=found.identity,
                pack_weights=False,
            )
            converted = self._pack(f"{found.identity}-tokenizer", request, _TOKENIZER_BYTES, job)
            model_dir = str(converted.path)
        held = [one for one in (pulled, converted) if one is not None]
        checkpoint = Checkpoint(
            model_dir=model_dir,
            weight_files=tuple(str(file) for file in found.weight_files),
            dtype=dtype,
            weight_bytes=sum(tensor_bytes(tensor, Quantization.NONE, DTYPE_BYTES[dtype]) for tensor in found.tensors),
        )

        def release() -> None:
            for one in held:
                one.release()

        return Prepared(checkpoint, release)

    def _pack(self, key: str, request: PackRequest, need_bytes: int, job: PullJob) -> Held:
        def fill(work: Path) -> None:
            for file in work.iterdir():
                if file.is_file():
                    file.unlink()  # the next try cannot use a half-written packed file
            self.packer(msgspec.structs.replace(request, out_dir=str(work)), job)

        job.say(Phase.PACKING, 0, 0, "starting the packer")
        return self.cache.obtain("packed", key, need_bytes, fill, job, f"packing {Path(request.model_dir).name}")
