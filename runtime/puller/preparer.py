"""Prepares registered models for the engine: finds, pulls, checks and packs their files, each once, in threads of its own."""

import asyncio
import tempfile
from collections.abc import Callable, Collection, Mapping
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
    Policy,
    inspect,
    read_json,
    stored_quantization,
)
from runtime.puller.index_cache import IndexCache
from runtime.puller.inspection import ModelMetadata
from runtime.puller.metadata import look_remote
from runtime.puller.pack.request import PackRequest
from runtime.puller.pack_identity import check_quantizable, chosen_quantization, pack_key
from runtime.puller.packed_models import PackedModels, Packer
from runtime.puller.packer import run_packer
from runtime.puller.progress import PullJob
from runtime.puller.pulled_files import PulledFiles
from runtime.puller.sizing import compute_dtype, geometry_of, needs_of, unpacking_of
from runtime.puller.source import Source
from runtime.puller.sources.resolve import locate
from runtime.puller.support_probe import SupportProbe
from runtime.types import ModelSource

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
        packer: Packer = run_packer,
        probe: SupportProbe | None = None,
        *,
        indexes: IndexCache | None = None,
    ) -> None:
        self._packer = packer
        self._config = config
        self._pulled_files = PulledFiles(cache, config.pull_min_rate_bytes)
        self._packed = PackedModels(cache, packer)
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
        job.say(Phase.PULLING, 0, 0, "reading the list of files")
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
        self,
        source: ModelSource,
        settings: ModelSettings,
        device: str,
        *,
        group_sizes: Collection[int] = (),
        local_only: bool = False,
    ) -> ModelMetadata:
        """See runtime.puller.inspection.ModelInspector."""
        job = PullJob(lambda progress: None)
        return await self._in_thread(
            self._pool_of(source), lambda: self._look(source, settings, device, group_sizes, local_only, job), job
        )

    async def refusal(self, look: ModelMetadata, settings: ModelSettings) -> str:
        """See runtime.puller.inspection.Fitter."""
        if settings.adapter_of is not None or look.is_remote_gguf:
            return ""  # whether an adapter suits its base, or the engine runs a GGUF file, shows when it is loaded
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
        listing = self._pulled_files.listing(place, source, job)
        is_adapter_source = settings.adapter_of is not None
        if is_adapter_source:
            packed = self._adapters.find(listing.key, compute_dtype(settings.dtype, "", device))
        else:
            packed = self._packed.find(pack_key(listing.key, settings, device))
        if packed is not None:
            return replace(packed, identity=listing.key)
        held = self._pulled_files.pull(place, listing, job)
        first = "" if is_adapter_source else listing.files[0].name
        return _Pulled(held, held.path / first if first.endswith(".gguf") else held.path, listing.key)

    def _unpacked(
        self, place: Path | Source, pulled: "_Pulled | None", settings: ModelSettings, device: str, job: PullJob
    ) -> Prepared:
        """Return the model of pulled or local files, which are packed if need be."""
        if settings.adapter_of is not None:
            return self._packed_adapter(place, pulled, compute_dtype(settings.dtype, "", device), job)
        if pulled is not None:
            found = inspect(pulled.path, self._policy)
            prepared = self._packed.prepare(found, pulled.held, pulled.identity, settings, device, job)
            return replace(prepared, identity=pulled.identity)
        assert isinstance(place, Path)
        # Read before the files are, so that a change in between shows as a difference later.
        identity = inspect(place, self._policy).identity
        found = inspect(place, self._policy)
        prepared = self._packed.prepare(found, None, found.identity, settings, device, job)
        return replace(prepared, identity=identity)

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
        return self._pulled_files.listing(place, source, job).key

    def _look(
        self,
        source: ModelSource,
        settings: ModelSettings,
        device: str,
        group_sizes: Collection[int],
        local_only: bool,
        job: PullJob,
    ) -> ModelMetadata:
        place = locate(source, self._config)
        if settings.adapter_of is not None:
            if not isinstance(place, Path):
                raise LoadFailed(
                    f"{source.uri} is not on this machine; the size of an adapter is known once it is pulled"
                )
            return self._adapters.look(place, compute_dtype(settings.dtype, "", device))
        gguf_file, is_remote_gguf = None, False
        if isinstance(place, Path):
            found = inspect(place, self._policy)
            gguf_file = found.weight_files[0] if found.kind is CheckpointKind.GGUF else None
            config, tensors = self._indexes.get(found)
            quantization = chosen_quantization(found.quantization, settings, found.model_dir.name)
        elif local_only:
            raise LoadFailed(f"{source.uri} is not on this machine")
        else:
            config, tensors = look_remote(place, job)
            is_remote_gguf = any(tensor.blocks for tensor in tensors)
            quantization = chosen_quantization(stored_quantization(config)[0], settings, source.uri)
        try:
            geometry = geometry_of(config)
        except KeyError as error:
            reason = "" if local_only else self._refusal(config, gguf_file, settings.max_model_len, job)
            raise LoadFailed(f"{source.uri}: {reason or f'config.json has no {error.args[0]}'}") from error
        check_quantizable(geometry.architecture, quantization)
        quantised = msgspec.structs.replace(settings, quantize=quantization)
        by_size = {size: needs_of(geometry, tensors, quantised, device, size) for size in {1, *group_sizes}}
        return ModelMetadata(
            geometry,
            by_size[1],
            quantization,
            bool(tensors) and quantization is Quantization.NONE,
            config,
            gguf_file,
            unpacking_of(geometry, tensors, quantised, device),
            is_remote_gguf,
            by_size,
        )


def _give_back(future: "asyncio.Future[T]") -> None:
    if not future.cancelled() and future.exception() is None:
        result = future.result()
        if isinstance(result, Prepared | _Pulled):
            result.release()
