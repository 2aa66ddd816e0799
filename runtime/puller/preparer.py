"""From a registration to a Checkpoint: pull, look, pack if need be, each once. Knows the order and the keys; the work is runtime.puller's."""

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from common.model_key import ModelSettings, Quantization
from runtime.config.schema import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.models.model_state import Phase, Prepared, Report
from runtime.puller.adapter.files import identity_of, is_adapter
from runtime.puller.adapter.preparing import AdapterPreparer
from runtime.puller.cache import Cache, Held
from runtime.puller.checkpoint_check import (
    CheckpointKind,
    CheckpointSummary,
    Policy,
    inspect,
    read_json,
    stored_quantization,
)
from runtime.puller.download import pull
from runtime.puller.index_cache import IndexCache
from runtime.puller.inspection import ModelMetadata
from runtime.puller.metadata import look_remote
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.pack_identity import chosen_quantization, pack_key, packed_bytes
from runtime.puller.packer import run_packer
from runtime.puller.progress import PullJob
from runtime.puller.resolve import locate
from runtime.puller.safetensors_header import read_header
from runtime.puller.sizing import (
    DTYPE_BYTES,
    checkpoint_dtype,
    compute_dtype,
    geometry_of,
    needs_of,
    tensor_bytes,
)
from runtime.puller.source import Listing, Source, Unreachable
from runtime.puller.support_probe import SupportProbe
from runtime.types import Checkpoint, ModelSource

log = logging.getLogger(__name__)

T = TypeVar("T")

_ABANDON_S = 5.0


@dataclass(frozen=True, slots=True)
class _Pulled:
    """Files in the cache: the lock on them, the checkpoint's path, and the identity that the source gives them."""

    held: Held
    path: Path
    identity: str

    def release(self) -> None:
        self.held.release()


class CheckpointPreparer:
    """Implements runtime.models.model_state.Preparer and runtime.puller.inspection.Fitter over one disk cache."""

    def __init__(
        self,
        config: RuntimeConfig,
        cache: Cache,
        packer: Callable[[PackRequest, PullJob], None] = run_packer,
        probe: SupportProbe | None = None,
        *,
        indexes: IndexCache | None = None,
    ) -> None:
        self._packer = packer
        self._config = config
        self._cache = cache
        self._adapters = AdapterPreparer(cache, config.engine.max_adapter_rank)
        self._judge = probe or SupportProbe()
        self._indexes = indexes or IndexCache()
        self._policy = Policy(config.allow_pickle, config.allow_remote_code)
        self._threads = ThreadPoolExecutor(config.max_loading_concurrency + 4, thread_name_prefix="files")
        # Sources may be slow, so what waits for them has threads and a limit of its own.
        self._network = ThreadPoolExecutor(config.max_pulling_concurrency + 4, thread_name_prefix="network")
        self._pulls = asyncio.Semaphore(config.max_pulling_concurrency)
        self._packs = asyncio.Semaphore(config.max_loading_concurrency)

    async def prepare(self, source: ModelSource, settings: ModelSettings, device: str, report: Report) -> Prepared:
        """See runtime.models.model_state.Preparer."""
        job = PullJob(report, source.uri)
        job.say(Phase.PULLING, 0, 0, "looking")
        place = await self._in_thread(self._threads, lambda: locate(source, self._config), job)
        pulled: _Pulled | None = None
        if not isinstance(place, Path):
            async with self._pulls:
                found = await self._in_thread(
                    self._network, lambda: self._pulled(place, source, settings, device, job), job
                )
            if isinstance(found, Prepared):
                return found
            pulled = found
        try:
            async with self._packs:
                return await self._in_thread(
                    self._threads, lambda: self._unpacked(place, pulled, settings, device, job), job
                )
        except BaseException:
            if pulled is not None:
                pulled.release()
            raise

    async def identity(self, source: ModelSource) -> str:
        """See runtime.models.model_state.Preparer."""
        job = PullJob(lambda progress: None)
        return await self._in_thread(self._pool_of(source), lambda: self._identity(source, job), job)

    async def look(
        self, source: ModelSource, settings: ModelSettings, device: str, *, local_only: bool = False
    ) -> ModelMetadata:
        """See runtime.puller.inspection.Fitter."""
        job = PullJob(lambda progress: None)
        return await self._in_thread(
            self._pool_of(source), lambda: self._look(source, settings, device, local_only, job), job
        )

    async def refusal(self, look: ModelMetadata, settings: ModelSettings) -> str:
        """See runtime.puller.inspection.Fitter."""
        if settings.adapter_of is not None:
            return ""  # whether an adapter suits its base shows when it is loaded over it
        job = PullJob(lambda progress: None)
        return await self._in_thread(
            self._threads, lambda: self._refusal(look.config, look.gguf_file, settings.max_model_len, job), job
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._network.shutdown(wait=False, cancel_futures=True)

    def _pool_of(self, source: ModelSource) -> ThreadPoolExecutor:
        is_local = source.uri.startswith(("/", "file://", "pvc://")) and not source.storage_params
        return self._threads if is_local and source.storage_key is None else self._network

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T], job: PullJob) -> T:
        future = asyncio.get_running_loop().run_in_executor(pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread stops at its next check; what it may have brought all the same is given back. A library that waits for
            # its store does not check, and must not keep the model from being unloaded.
            job.cancel()
            future.add_done_callback(_give_back)
            await asyncio.wait((future,), timeout=_ABANDON_S)
            raise

    def _refusal(
        self, config: Mapping[str, object], gguf_file: Path | None, max_model_len: int | None, job: PullJob
    ) -> str:
        """See `refusal`. A GGUF file is checked by the packer, as before a load, and has its configuration from there."""
        if gguf_file is None:
            return self._judge.refusal(config, max_model_len, job)
        with tempfile.TemporaryDirectory(prefix="repertory-fit-") as folder:
            request = PackRequest(
                kind=CheckpointKind.GGUF.value,
                model_dir=str(gguf_file.parent),
                weight_files=(str(gguf_file),),
                out_dir=folder,
                source="",
                pack_weights=False,
            )
            try:
                self._packer(request, job)
            except LoadFailed as error:
                return error.detail
            return self._judge.refusal(read_json(Path(folder) / "config.json"), max_model_len, job)

    def _pulled(
        self, place: Source, source: ModelSource, settings: ModelSettings, device: str, job: PullJob
    ) -> "Prepared | _Pulled":
        """Return the packed model if there is one of the files that the source has now, else its files."""
        listing = self._listing(place, source, job)
        is_adapter_source = settings.adapter_of is not None
        if is_adapter_source:
            packed = self._adapters.find(listing.key, compute_dtype(settings.dtype, "", device))
        else:
            packed = self._find_packed(pack_key(listing.key, settings, device))
        if packed is not None:
            return replace(packed, identity=listing.key)
        held = self._pull(place, listing, job)
        first = "" if is_adapter_source else listing.files[0].name
        return _Pulled(held, held.path / first if first.endswith(".gguf") else held.path, listing.key)

    def _unpacked(
        self, place: Path | Source, pulled: "_Pulled | None", settings: ModelSettings, device: str, job: PullJob
    ) -> Prepared:
        """Return the model of pulled or local files, which are packed if need be."""
        if settings.adapter_of is not None:
            return self._packed_adapter(place, pulled, compute_dtype(settings.dtype, "", device), job)
        if pulled is not None:
            found = self._from_files(pulled.path, pulled.held, pulled.identity, settings, device, job)
            return replace(found, identity=pulled.identity)
        assert isinstance(place, Path)
        # Read before the files are, so that a change in between shows as a difference later.
        identity = inspect(place, self._policy).identity
        return replace(self._from_files(place, None, "", settings, device, job), identity=identity)

    def _packed_adapter(self, place: Path | Source, pulled: "_Pulled | None", dtype: str, job: PullJob) -> Prepared:
        """Pack an adapter in the type of its base, which the manager has entered in the settings. The pulled files are not needed after it."""
        if pulled is None:
            assert isinstance(place, Path)
            return self._adapters.prepare(place, "", dtype, job)
        found = self._adapters.prepare(pulled.path, pulled.identity, dtype, job)
        pulled.release()
        return found

    def _identity(self, source: ModelSource, job: PullJob) -> str:
        place = locate(source, self._config)
        if isinstance(place, Path) and is_adapter(place):
            return identity_of(place)
        if isinstance(place, Path):
            return inspect(place, self._policy).identity
        return self._listing(place, source, job).key

    def _listing(self, place: Source, source: ModelSource, job: PullJob) -> Listing:
        """What the source lists now; if it doesn't answer, what it listed last."""
        # one path may be in two buckets: what was listed of the one says nothing of the other
        name = hashlib.blake2b(msgspec.json.encode(source, order="sorted"), digest_size=16).hexdigest()
        try:
            listing = place.listing(job)
        except Unreachable as error:
            remembered = self._cache.recall(name)
            if remembered is None:
                raise
            log.warning("%s; using what it listed before", error.message)
            return msgspec.json.decode(remembered, type=Listing)
        # a signature or a password in a URL is a secret, and notes are kept
        if not any("?" in file.location or "@" in file.location for file in listing.files):
            self._cache.remember(name, msgspec.json.encode(listing))
        return listing

    def _pull(self, source: Source, listing: Listing, job: PullJob) -> Held:
        def reserve(total_bytes: int) -> int:
            return self._cache.grow("pulled", listing.key, total_bytes, listing.origin)

        def fill(work: Path) -> None:
            rate = self._config.pull_min_rate_bytes
            pull(source, listing, work, job, reserve=reserve, min_bytes_per_s=rate)

        return self._cache.obtain("pulled", listing.key, listing.total_bytes, fill, job, listing.origin)

    def _from_files(
        self, path: Path, pulled: Held | None, identity: str, settings: ModelSettings, device: str, job: PullJob
    ) -> Prepared:
        found = inspect(path, self._policy)
        quantization = chosen_quantization(found.quantization, settings, found.model_dir.name)
        dtype = compute_dtype(settings.dtype, checkpoint_dtype(found.config), device)
        if found.kind is CheckpointKind.SAFETENSORS and quantization is Quantization.NONE:
            return self._as_it_lies(found, pulled, dtype, job)
        key = pack_key(identity or found.identity, settings, device)
        packed = self._find_packed(key)
        if packed is None:
            request = PackRequest(
                kind=found.kind.value,
                model_dir=str(found.model_dir),
                weight_files=tuple(str(file) for file in found.weight_files),
                out_dir="",
                source=identity or found.identity,
                quantization=quantization,
                double_quant=settings.double_quant,
                dtype=dtype,
            )
            plain = self._dequantised(request, identity or found.identity, settings, device)
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
            packed = self._find_packed(key)
            if packed is None:
                raise LoadFailed(
                    f"{path.name}: the packed file was dropped from the disk cache at once; its budget is too small"
                )
        if pulled is not None:
            pulled.release()
        return packed

    def _dequantised(
        self, request: PackRequest, identity: str, settings: ModelSettings, device: str
    ) -> Prepared | None:
        """A GGUF file's unquantised pack, if there is one: reading a GGUF file again takes much longer than quantising."""
        if request.kind != CheckpointKind.GGUF.value or request.quantization is Quantization.NONE:
            return None
        plain = msgspec.structs.replace(settings, quantize=Quantization.NONE, double_quant=False)
        return self._find_packed(pack_key(identity, plain, device))

    def _as_it_lies(self, found: CheckpointSummary, pulled: Held | None, dtype: str, job: PullJob) -> Prepared:
        model_dir, beside = str(found.model_dir), None
        if found.needs_tokenizer:
            request = PackRequest(
                kind=found.kind.value,
                model_dir=model_dir,
                weight_files=(),
                out_dir="",
                source=found.identity,
                pack_weights=False,
            )
            beside = self._pack(f"{found.identity}-tokenizer", request, 64 << 20, job)
            model_dir = str(beside.path)
        held = [one for one in (pulled, beside) if one is not None]
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
                    file.unlink()  # a half-written packed file is of no use to the next try
            self._packer(msgspec.structs.replace(request, out_dir=str(work)), job)

        job.say(Phase.PACKING, 0, 0, "starting the packer")
        return self._cache.obtain("packed", key, need_bytes, fill, job, f"packing {Path(request.model_dir).name}")

    def _find_packed(self, key: str) -> Prepared | None:
        held = self._cache.find("packed", key)
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

    def _look(
        self, source: ModelSource, settings: ModelSettings, device: str, local_only: bool, job: PullJob
    ) -> ModelMetadata:
        place = locate(source, self._config)
        if settings.adapter_of is not None:
            if not isinstance(place, Path):
                raise LoadFailed(
                    f"{source.uri} is not on this machine; the size of an adapter is known once it is pulled"
                )
            return self._adapters.look(place, compute_dtype(settings.dtype, "", device))
        gguf_file = None
        if isinstance(place, Path):
            found = inspect(place, self._policy)
            gguf_file = found.weight_files[0] if found.kind is CheckpointKind.GGUF else None
            config, tensors = self._indexes.get(found)
            quantization = chosen_quantization(found.quantization, settings, found.model_dir.name)
        elif local_only:
            raise LoadFailed(f"{source.uri} is not on this machine")
        else:
            config, tensors = look_remote(place, job)
            quantization = chosen_quantization(stored_quantization(config)[0], settings, source.uri)
        try:
            geometry = geometry_of(config)
        except KeyError as error:
            reason = "" if local_only else self._refusal(config, gguf_file, settings.max_model_len, job)
            raise LoadFailed(f"{source.uri}: {reason or f'config.json has no {error.args[0]}'}") from error
        quantised = msgspec.structs.replace(settings, quantize=quantization)
        needs = needs_of(geometry, tensors, quantised, device, self._config.engine.tensor_parallel)
        return ModelMetadata(
            geometry, needs, quantization, bool(tensors) and quantization is Quantization.NONE, config, gguf_file
        )


def _give_back(future: "asyncio.Future[T]") -> None:
    if not future.cancelled() and future.exception() is None:
        result = future.result()
        if isinstance(result, Prepared | _Pulled):
            result.release()
